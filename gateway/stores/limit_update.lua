-- One Update of policies/limits/messages.py, applied as policies/limits/counting.py says.
--
-- KEYS: 1 clock, 2 holders, 3 the holder's own, 4... one hash per counter of the update. All have one hash tag.
-- ARGV: 1 the update in MessagePack, 2 the time in us, empty for the server's own (tests bring theirs), 3 `fill` or empty.
-- Returns the reply in MessagePack, or nil while the counters are not filled (a server that is new, or lost its data). To
-- `fill` them, which is possible until `filled` is set, posts say what was spent in all: they can be repeated.
-- Without a holder it only reads.
--
-- A counter's hash: `t` arrival time of a rate; `s<start>` spent by slice or period; `h<id>` held, by the holder's number.
-- An id that is not among the living holders is nobody's: what it held is removed when the counter is looked at next.

local INDEFINITE_MS = 7 * 86400000 -- a holder speaks of each counter it holds more often than that
local KEPT_PERIODS = 3
local REMEMBERED_US = 3600000000 -- policies.limits.messages.REMEMBERED_US

local update = cmsgpack.unpack(ARGV[1])
local holder, number, ttl_us = update[1], update[2], update[3]
local counters, posts, releases, claims = update[4], update[5], update[6], update[7]
local groups, wants, is_last = update[8], update[9], update[10]
-- Fields of a counter, as gateway/stores/limit_redis.py sends them.
local KIND, AMOUNT, WINDOW, SLICE, BURST, PERIOD, NEXT, LAST = 1, 2, 3, 4, 5, 6, 7, 8

local clock = redis.call('HMGET', KEYS[1], 'now', 'filled')
local fills = ARGV[3] == 'fill'
if fills == (clock[2] ~= false) then return false end
local now = tonumber(ARGV[2])
if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000000 + time[2]
end
now = math.max(now, tonumber(clock[1]) or 0) -- a failover may bring a slower clock

-- Numbers below 2^53 are exact; written out, because Lua would turn them into 1.7e+15.
local function text(value) return string.format('%.0f', value) end

local reads_only = holder == ''
if not reads_only then
    redis.call('HSET', KEYS[1], 'now', text(now))
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now))
end

-- floor(a * b / c) without leaving what a double holds exactly, where b < 2^26 or b <= c
local function scaled(a, b, c)
    local whole = math.floor(a / c)
    local rest = a - whole * c
    return whole * b + math.floor(rest * b / c)
end
local function cost(counter, units) -- ceil(units * window / amount)
    local amount, window = counter[AMOUNT], counter[WINDOW]
    local whole = math.floor(window / amount)
    return units * whole + math.ceil(units * (window - whole * amount) / amount)
end

local function unknown(was_applied)
    return cmsgpack.pack({now, false, was_applied, redis.call('ZCARD', KEYS[2]), {}, {}, {}})
end
local id = 'nobody'
if not reads_only then
    local known = redis.call('HMGET', KEYS[3], 'id', 'number', 'until', 'reply')
    id = known[1]
    local last_number, is_alive = tonumber(known[2]), id and redis.call('ZSCORE', KEYS[2], id)
    if id and not is_alive then
        if tonumber(known[3]) + REMEMBERED_US > now then return unknown(last_number == number) end
        id = false
    end
    if id and last_number == number then
        redis.call('ZADD', KEYS[2], text(now + ttl_us), id)
        redis.call('HSET', KEYS[3], 'until', text(now + ttl_us))
        return known[4]
    end
    if number ~= (id and last_number + 1 or 1) then return unknown(false) end
    id = id or text(redis.call('HINCRBY', KEYS[1], 'holders', 1))
    redis.call('ZADD', KEYS[2], text(now + ttl_us), id)
end

local living = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. text(now), '+inf')) do living[name] = true end

local states, by_key = {}, {}
local function load(key)
    local state = {tat = 0, spent = {}, held = 0, mine = 0, set = {}, gone = {}}
    local fields = redis.call('HGETALL', key)
    for at = 1, #fields, 2 do
        local field, value = fields[at], tonumber(fields[at + 1])
        local kind, name = string.sub(field, 1, 1), string.sub(field, 2)
        if kind == 't' then
            state.tat = value
        elseif kind == 's' then
            state.spent[tonumber(name)] = value
        elseif not living[name] then
            state.gone[#state.gone + 1] = field
        else
            state.held = state.held + value
            if name == id then state.mine = value end
        end
    end
    return state
end
local function forget_spent(state, start)
    state.spent[start] = nil
    state.gone[#state.gone + 1] = 's' .. text(start)
end
local function prune(counter, state)
    if counter[KIND] == 'rolling' then
        for start in pairs(state.spent) do
            if start <= now - counter[WINDOW] - counter[SLICE] then forget_spent(state, start) end
        end
    elseif counter[KIND] == 'period' then
        local starts = {}
        for start in pairs(state.spent) do starts[#starts + 1] = start end
        table.sort(starts)
        for at = 1, #starts - KEPT_PERIODS do forget_spent(state, starts[at]) end
    end
end
for index, counter in ipairs(counters) do
    local key = KEYS[3 + index]
    by_key[key] = by_key[key] or load(key)
    states[index] = by_key[key]
    if not reads_only then prune(counter, states[index]) end
end

local function period(counter) return now >= counter[NEXT] and counter[NEXT] or counter[PERIOD] end
local function period_end(counter) return now >= counter[NEXT] and counter[LAST] or counter[NEXT] end
local function spent_of(counter, state)
    if counter[KIND] == 'period' then return state.spent[period(counter)] or 0 end
    local sum = 0
    if counter[KIND] == 'rolling' then
        for start, units in pairs(state.spent) do
            if start > now - counter[WINDOW] - counter[SLICE] then sum = sum + units end
        end
    end
    return sum
end
local function hold(counter, state, units)
    if counter[KIND] == 'rate' then
        if units > 0 and counter[AMOUNT] > 0 then
            state.tat = math.max(state.tat, now) + cost(counter, units)
        elseif units < 0 and counter[AMOUNT] > 0 then
            state.tat = state.tat - cost(counter, -units)
        end
        state.set['t'] = state.tat
        return
    end
    local mine = math.max(0, state.mine + units)
    state.held = state.held + mine - state.mine
    state.mine = mine
    state.set['h' .. id] = mine
end
local function post(counter, state, at, units)
    local start
    if counter[KIND] == 'rolling' then
        if at == 0 then at = now end
        start = at - at % counter[SLICE]
    elseif counter[KIND] == 'period' then
        start = at ~= 0 and at or period(counter)
    else
        return
    end
    state.spent[start] = (fills and 0 or state.spent[start] or 0) + units
    state.set['s' .. text(start)] = state.spent[start]
end
local function room(counter, state)
    local amount = counter[AMOUNT]
    if amount <= 0 then return 0 end
    if counter[KIND] == 'rate' then
        local free = cost(counter, counter[BURST]) - math.max(0, state.tat - now)
        if free < 0 then return -1 end
        local units = math.floor(free * amount / counter[WINDOW]) -- a guess: the product may be too large
        while cost(counter, units + 1) <= free do units = units + 1 end
        while units > 0 and cost(counter, units) > free do units = units - 1 end
        return units
    end
    return amount - spent_of(counter, state) - state.held
end
local function reading(counter, state)
    if counter[KIND] == 'rate' then
        local behind, amount, window = math.max(0, state.tat - now), counter[AMOUNT], counter[WINDOW]
        local spent = math.floor(behind * amount / window)
        while amount > 0 and scaled(window, spent, amount) < behind do spent = spent + 1 end
        while spent > 0 and scaled(window, spent - 1, amount) >= behind do spent = spent - 1 end
        return {spent, 0, behind > 0 and state.tat or 0}
    end
    local spent, resets = spent_of(counter, state), 0
    if spent ~= 0 and counter[KIND] == 'rolling' then
        for start in pairs(state.spent) do resets = math.max(resets, start + counter[SLICE] + counter[WINDOW]) end
    elseif spent ~= 0 and counter[PERIOD] ~= 0 then
        resets = period_end(counter)
    end
    return {spent, state.held, resets}
end
local function fits_at(counter, state, units)
    local amount = counter[AMOUNT]
    if counter[KIND] == 'rate' then
        if amount <= 0 or units > counter[BURST] then return 0 end
        return math.max(state.tat, now) + cost(counter, units) - cost(counter, counter[BURST])
    end
    if units > amount then return 0 end
    if counter[KIND] == 'period' then return counter[PERIOD] ~= 0 and period_end(counter) or 0 end
    if counter[KIND] == 'rolling' then
        local spent, starts = spent_of(counter, state), {}
        for start in pairs(state.spent) do starts[#starts + 1] = start end
        table.sort(starts)
        for _, start in ipairs(starts) do
            spent = spent - state.spent[start]
            if spent + state.held + units <= amount then return start + counter[SLICE] + counter[WINDOW] end
        end
    end
    return 0
end
local function take(group) -- all of it, or why not
    for at, line in ipairs(group) do
        local index, units = line[1] + 1, line[2]
        local counter, state = counters[index], states[index]
        if units > 0 and units > room(counter, state) then
            local stands = reading(counter, state)
            local refusal = {line[1], fits_at(counter, state, units), stands[1], stands[2]}
            for earlier = 1, at - 1 do
                hold(counters[group[earlier][1] + 1], states[group[earlier][1] + 1], -group[earlier][2])
            end
            return refusal
        end
        hold(counter, state, units)
    end
    return false
end

for _, line in ipairs(posts) do post(counters[line[1] + 1], states[line[1] + 1], line[2], line[3]) end
for _, line in ipairs(releases) do hold(counters[line[1] + 1], states[line[1] + 1], -line[2]) end
for _, line in ipairs(claims) do hold(counters[line[1] + 1], states[line[1] + 1], line[2]) end
local refusals, granted = {}, {}
for at, group in ipairs(groups) do refusals[at] = take(group) end
for at, line in ipairs(wants) do
    local counter, state = counters[line[1] + 1], states[line[1] + 1]
    granted[at] = math.max(0, math.min(line[2], room(counter, state)))
    hold(counter, state, granted[at])
end
if is_last then
    redis.call('ZREM', KEYS[2], id)
    for _, state in pairs(by_key) do
        state.held, state.mine = state.held - state.mine, 0
        state.set['h' .. id] = nil
        state.gone[#state.gone + 1] = 'h' .. id
    end
end
local readings = {}
for index, counter in ipairs(counters) do readings[index] = reading(counter, states[index]) end
if reads_only then return cmsgpack.pack({now, true, false, 0, {}, {}, readings}) end

local function life_ms(counter, state) -- 0: for ever
    local ms = 60000
    if counter[KIND] == 'rate' then
        ms = ms + math.max(0, state.tat - now) / 1000
    elseif counter[KIND] == 'rolling' then
        ms = ms + (counter[WINDOW] + counter[SLICE]) / 1000
    elseif counter[KIND] == 'period' then
        if counter[PERIOD] == 0 then return 0 end
        ms = ms + 86400000 + math.max(0, counter[LAST] - now) / 1000
    end
    return state.held > 0 and math.max(ms, INDEFINITE_MS) or ms
end
local function save(key, counter, state)
    if #state.gone > 0 then redis.call('HDEL', key, unpack(state.gone)) end
    local fields = {}
    for field, value in pairs(state.set) do
        if value == 0 and string.sub(field, 1, 1) == 'h' then
            redis.call('HDEL', key, field)
        else
            fields[#fields + 1] = field
            fields[#fields + 1] = text(value)
        end
    end
    if #fields > 0 then redis.call('HSET', key, unpack(fields)) end
    local ms = life_ms(counter, state)
    if ms == 0 then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, text(math.ceil(ms))) end
end
for index, counter in ipairs(counters) do
    local key = KEYS[3 + index]
    if by_key[key] then save(key, counter, by_key[key]) end
    by_key[key] = nil
end
local reply = cmsgpack.pack({now, true, false, redis.call('ZCARD', KEYS[2]), refusals, granted, readings})
redis.call('HSET', KEYS[3], 'id', id, 'number', text(number), 'until', text(now + ttl_us), 'reply', is_last and '' or reply)
redis.call('PEXPIRE', KEYS[3], text(math.ceil((ttl_us + REMEMBERED_US) / 1000) + 60000))
return reply
