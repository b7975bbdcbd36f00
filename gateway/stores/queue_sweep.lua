-- What nobody ends otherwise, and the questions that only read. As gateway.stores.queue_sweep. Follows queue_jobs.lua.

local function forget(row)
  local id = row.id
  call('DEL', job_key(id), payload_key(id), P .. 'result:' .. id, P .. 'events:' .. id, P .. 'settled:' .. id)
  call('ZREM', P .. 'due', id)
  call('ZREM', P .. 'settled-due', id)
  call('ZREM', P .. 'jobs', id)
  call('ZREM', P .. 'jobs-of:' .. row.tenant, id)
  if row.parent ~= '' then call('ZREM', P .. 'children:' .. row.parent, id) end
  count(row.state, -1)
end

-- Expired, then purged, then forgotten; which it was. `files` gets the name of a result outside of the database.
local function end_of_time(row, files)
  if not FINAL[row.state] then
    expire(row)
    return 'expired'
  end
  if row.is_purged == 1 then
    forget(row)
    return 'forgotten'
  end
  local file = call('HGET', P .. 'result:' .. row.id, 'file')
  if file and file ~= '' then files[#files + 1] = file end
  call('DEL', payload_key(row.id), P .. 'result:' .. row.id, P .. 'events:' .. row.id)
  if row.scope and call('HGET', idempotency_key(row.scope), 'subject') == row.id then
    call('DEL', idempotency_key(row.scope))
  end
  write(job_key(row.id), {is_purged = 1, usage = '', details = '', due_time = now + FORGET_S})
  call('ZADD', P .. 'due', text(now + FORGET_S), row.id)
  return 'purged'
end

function do_verb.purge()
  local row, files = load(arg.id, arg.tenant), {}
  if not row then return {'ok'} end
  if FINAL[row.state] and row.is_purged == 0 then end_of_time(row, files) end
  return {'ok', shown(row.id), files}
end

local function due(key, most) return call('ZRANGEBYSCORE', P .. key, '-inf', text(now), 'LIMIT', 0, most) end

function do_verb.sweep()
  local counts, files, most = {requeued = 0, dead = 0, expired = 0, cancelled = 0, purged = 0, forgotten = 0}, {}, arg.most
  local function add_one(what) counts[what] = counts[what] + 1 end
  for _, id in ipairs(due('leases', most)) do
    local row = load(id)
    if row.expires_time <= now and row.state ~= 'cancelling' then expire(row) else lose_owner(row, 'its lease lapsed') end
    add_one(row.state == 'queued' and 'requeued' or row.state)
  end
  for _, id in ipairs(due('due', most)) do
    local row = load(id)
    if row then add_one(end_of_time(row, files)) else call('ZREM', P .. 'due', id) end
  end
  local stopping = call('SRANDMEMBER', P .. 'stopping')
  if stopping then counts.cancelled = counts.cancelled + stop_children(stopping, most) end
  for _, id in ipairs(due('parents-due', most)) do
    local row = load_parent(id)
    if row.finished_time then
      if row.scope then call('DEL', idempotency_key(row.scope)) end
      call('DEL', parent_key(id), P .. 'children:' .. id)
      call('ZREM', P .. 'parents-due', id)
      call('ZREM', P .. 'parents:' .. row.door, id)
      call('ZREM', P .. 'parents-of:' .. row.tenant .. '\0' .. row.door, id)
      add_one('forgotten')
    elseif row.state == 'validating' then
      end_parent(row, 'expired')
      add_one('expired')
    else
      call('ZREM', P .. 'parents-due', id)  -- its children have no more time than it
    end
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'news-made', '-inf', text(now - FORGET_S), 'LIMIT', 0, most)) do
    local subject = call('HGET', P .. 'news:' .. id, 'subject')
    if subject then call('ZREM', P .. 'news-of:' .. subject, id) end
    for _, key in ipairs({'news-made', 'news-due', 'news-dead'}) do call('ZREM', P .. key, id) end
    call('DEL', P .. 'news:' .. id)
  end
  local is_all = #due('leases', 1) + #due('due', 1) + #due('parents-due', 1) == 0 and call('SCARD', P .. 'stopping') == 0
  return {'ok', counts.requeued, counts.dead, counts.expired, counts.cancelled, counts.purged, counts.forgotten,
    is_all and 1 or 0, files}
end

-- Reading.

function do_verb.get()
  local row = load(arg.id, arg.tenant)
  return {'ok', row and shown(row.id)}
end

function do_verb.result()
  local row = load(arg.id, arg.tenant)
  if not row then return {'ok'} end
  local found = call('HMGET', P .. 'result:' .. row.id, 'headers', 'body', 'file')
  if not found[1] then return {'ok'} end
  return {'ok', row.status, row.result_bytes, found[1], found[2], found[3]}
end

function do_verb.payload()
  local row = load(arg.id, arg.tenant)
  return {'ok', row and packed(call('HMGET', payload_key(row.id), unpack(PAYLOAD)))}
end

function do_verb.events()
  local row = load(arg.id, arg.tenant)
  if not row then return {'ok', {}} end
  return {'ok', call('LRANGE', P .. 'events:' .. row.id, arg.index + 1, arg.index + arg.limit)}
end

-- Pages of what is listed, newest first, or by position for children; whoever filters reads on here.
local LEASED = {running = true, cancelling = true}

-- Of those that somebody has, newest first: workers ask every second, and all that are kept may be very many.
local function list_leased()
  local seen, found = {}, {}
  for _, id in ipairs(call('ZRANGE', P .. 'leases', 0, -1)) do
    local known = call('HMGET', job_key(id), 'state', 'seq', 'tenant', 'lane', 'door')
    if arg.states[known[1]] and (arg.tenant == '' or arg.tenant == known[3]) and (arg.lane == '' or arg.lane == known[4])
      and (not arg.doors or arg.doors[known[5]]) and (not arg.cursor or tonumber(known[2]) < tonumber(arg.cursor)) then
      seen[#seen + 1] = {tonumber(known[2]), id}
    end
  end
  table.sort(seen, function(one, other) return one[1] > other[1] end)
  for n = 1, min(#seen, arg.limit) do found[n] = shown(seen[n][2]) end
  return {'ok', #seen > arg.limit and text(seen[arg.limit][1]) or '', found}
end

function do_verb.list()
  if arg.states and arg.parent == '' then
    local is_leased = true
    for state in pairs(arg.states) do is_leased = is_leased and LEASED[state] end
    if is_leased then return list_leased() end
  end
  local found, at, is_end = {}, arg.cursor, false
  local key = arg.parent ~= '' and 'children:' .. arg.parent or arg.tenant ~= '' and 'jobs-of:' .. arg.tenant or 'jobs'
  for _ = 1, 20 do
    local page
    if arg.parent ~= '' then
      page = call('ZRANGEBYSCORE', P .. key, at and '(' .. at or '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 100)
    else
      page = call('ZREVRANGEBYSCORE', P .. key, at and '(' .. at or '+inf', '-inf', 'WITHSCORES', 'LIMIT', 0, 100)
    end
    is_end = #page < 200
    for n = 1, #page, 2 do
      local row = load(page[n], arg.tenant)
      local is_wanted = row and (arg.lane == '' or row.lane == arg.lane)
        and (not arg.states or arg.states[row.state]) and (not arg.doors or arg.doors[row.door])
      if is_wanted then
        if #found == arg.limit then return {'ok', at, found} end
        found[#found + 1] = shown(row.id)
      end
      at = page[n + 1]
    end
    if is_end then return {'ok', '', found} end
  end
  return {'ok', at, found}
end

local LANE = {'flex', 'batch', 'running', 'delayed'}
local function lane_stats(lane)
  local sums, tenants, solitary, rate, oldest = {flex = 0, batch = 0, running = 0, delayed = 0}, 0, 0, 0, nil
  for _, line in ipairs({lane, SUSPECT .. lane}) do
    local found = line_of(line)
    for _, name in ipairs(LANE) do sums[name] = sums[name] + found[name] end
    tenants = tenants + call('ZCARD', P .. 'vt:' .. line)
    rate = rate + rate_of(found)
    if line ~= lane then solitary = found.flex + found.batch + found.delayed end
    for _, tenant in ipairs(call('ZREVRANGE', P .. 'vt:' .. line, 0, 99)) do
      for class = 0, 1 do
        local id = head(line, tenant, class)
        local queued = id and tonumber(call('HGET', job_key(id), 'queued_time'))
        if queued and (not oldest or queued < oldest) then oldest = queued end
      end
    end
  end
  return {text(sums.flex), text(sums.batch), text(sums.running), text(sums.delayed), text(tenants), text(solitary),
    oldest and text(oldest) or '', text(rate)}
end

function do_verb.standing()
  local row = load(arg.id, arg.tenant)
  if not row then return {'ok'} end
  local ahead = 0
  if row.state == 'queued' then
    ahead = call('ZCOUNT', ready_key(row), '-inf', '(' .. text(row.seq))
    if row.job_class == 1 then ahead = ahead + share_of(row.line, row.tenant).flex end
    local own = ahead
    for _, tenant in ipairs(call('ZRANGE', P .. 'vt:' .. row.line, 0, 999)) do
      if tenant ~= row.tenant then
        local share = share_of(row.line, tenant)
        ahead = ahead + min(share.flex + share.batch, own + 1)
      end
    end
  end
  return {'ok', row.state, ahead, lane_stats(row.lane)}
end

function do_verb.stats()
  local lanes, seen = {}, {}
  for _, line in ipairs(call('SMEMBERS', P .. 'lines')) do
    local lane = string.gsub(line, '^\1', '')
    local found = line_of(line)
    if found.flex + found.batch + found.running + found.delayed == 0 then
      call('SREM', P .. 'lines', line)
    elseif not seen[lane] then
      seen[lane] = true
      lanes[#lanes + 1] = {lane, lane_stats(lane)}
    end
  end
  local news = call('ZCOUNT', P .. 'news-due', '-inf', text(now))
  return {'ok', text(now), lanes, call('HGETALL', P .. 'tally'), news, call('ZCARD', P .. 'news-due') - news,
    call('ZCARD', P .. 'news-dead'), call('ZCARD', P .. 'settled-due')}
end

function do_verb.list_news()
  local key = arg.subject == '' and 'news-made' or 'news-of:' .. arg.subject
  local found = {}
  for _, id in ipairs(call('ZREVRANGE', P .. key, 0, arg.most - 1)) do
    found[#found + 1] = packed(call('HMGET', P .. 'news:' .. id, unpack(arg.fields)))
  end
  return {'ok', found}
end
