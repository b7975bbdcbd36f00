-- Jobs in Redis: what gateway.stores.queue_moves and queue_turns do, for many nodes. The other queue_*.lua follow this text.
-- KEYS: what every key begins with (one hash tag). ARGV: time in seconds or '', epoch, the names of a job's fields (msgpack), how many
-- calls follow; of each call its verb, its arguments (msgpack), how many binary ones there are, and these.
-- The answer of a call begins with 'ok', or with why not. A job or parent is one text: the lengths of its fields with commas
-- between (-1: there is none), a semicolon, the fields.
local call, floor, max, min = redis.call, math.floor, math.max, math.min
local P = KEYS[1] .. ':'
local arg, BINARY  -- of the call at hand; what is binary begins after ARGV[BINARY]
local FIELDS = cmsgpack.unpack(ARGV[3])
local NONE = {}  -- a field that is to be removed
local SUSPECT = '\1'
local LEASE_S, DEATHS_SUSPECT, DEATHS_DEAD, AGEING_S, BATCH_EVERY = 30, 2, 3, 900, 20
local FORGET_S = 30 * 86400
local EPOCH_FENCES = 1024  -- fences of a later epoch are higher than those of one before
local FINAL = {succeeded = true, failed = true, dead = true, cancelled = true, expired = true}
local WAITING = {staged = true, queued = true}
local STATES = {'staged', 'queued', 'running', 'cancelling', 'succeeded', 'failed', 'dead', 'cancelled', 'expired'}

local now = tonumber(ARGV[1])
if not now then
  local time = call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local NUMBER = {}
for _, name in ipairs({'job_class', 'is_stream', 'fence', 'attempts', 'max_attempts', 'runs', 'deaths', 'submitted_time',
  'queued_time', 'expires_time', 'due_time', 'keep_s', 'body_bytes', 'estimate', 'charged', 'started_time', 'finished_time',
  'not_before_time', 'lease_until_time', 'position', 'status', 'result_bytes', 'cost_nanousd', 'is_purged', 'events',
  'seq', 'is_finalized', 'created_time', 'released_time', 'settled_time', 'cancelled_time', 'is_stopping', 'total',
  'vt', 'weight', 'flex', 'batch', 'running', 'delayed', 'rate', 'rate_time', 'since_batch', 'floor',
  'is_parent', 'next_time', 'delivered_time'}) do NUMBER[name] = true end
for _, name in ipairs(STATES) do NUMBER[name] = true end

-- A number as its shortest exact text: times and virtual times keep all of their digits.
local function text(value)
  if type(value) ~= 'number' then return value end
  if value == floor(value) then return string.format('%.0f', value) end
  return string.format('%.17g', value)
end

local function read(key, names)
  local values, row = call('HMGET', key, unpack(names)), {}
  for at, name in ipairs(names) do
    local value = values[at]
    if value then row[name] = NUMBER[name] and tonumber(value) or value end
  end
  return row
end

local function write(key, changes)
  local set, gone = {}, {}
  for name, value in pairs(changes) do
    if value == NONE then gone[#gone + 1] = name
    else set[#set + 1] = name; set[#set + 1] = text(value) end
  end
  if #set > 0 then call('HSET', key, unpack(set)) end
  if #gone > 0 then call('HDEL', key, unpack(gone)) end
end

local function packed(values)
  local lengths = {}
  for at = 1, #values do
    lengths[at] = values[at] and #values[at] or -1
    values[at] = values[at] or ''
  end
  return table.concat(lengths, ',') .. ';' .. table.concat(values)
end

local function job_key(id) return P .. 'job:' .. id end
local function load(id, tenant)
  local row = read(job_key(id), FIELDS)
  if not row.id or (tenant and tenant ~= '' and tenant ~= row.tenant) then return nil end
  return row
end
local function shown(id) return packed(call('HMGET', job_key(id), unpack(FIELDS))) end

-- Turns.

local SHARE = {'vt', 'weight', 'flex', 'batch', 'running', 'delayed'}
local LINE = {'floor', 'since_batch', 'running', 'rate', 'rate_time', 'flex', 'batch', 'delayed'}

local function share_key(line, tenant) return P .. 'share:' .. line .. '\0' .. tenant end
local function share_of(line, tenant)
  local share = read(share_key(line, tenant), SHARE)
  for _, name in ipairs({'flex', 'batch', 'running', 'delayed'}) do share[name] = share[name] or 0 end
  share.weight = share.weight or 1
  return share
end
local function line_of(line)
  local found = read(P .. 'line:' .. line, LINE)
  for _, name in ipairs(LINE) do found[name] = found[name] or 0 end
  return found
end

local function rank(line, tenant, share)
  if share.flex + share.batch > 0 then call('ZADD', P .. 'vt:' .. line, text(share.vt), tenant)
  else call('ZREM', P .. 'vt:' .. line, tenant) end
  if share.batch > 0 then call('ZADD', P .. 'vt-batch:' .. line, text(share.vt), tenant)
  else call('ZREM', P .. 'vt-batch:' .. line, tenant) end
end

local function turn_of(row)
  if row.lease_until_time then return 'running' end
  if row.state ~= 'queued' then return nil end
  if row.not_before_time then return 'delayed' end
  return row.job_class == 1 and 'batch' or 'flex'
end

local function shift(tenant, line_before, before, line_after, after)
  if before == after and line_before == line_after then return end
  if before then
    local share = share_of(line_before, tenant)
    share[before] = share[before] - 1
    call('HINCRBY', P .. 'line:' .. line_before, before, -1)
    if not after or line_before ~= line_after then
      if share.flex + share.batch + share.running + share.delayed == 0
        and (share.vt or 0) <= line_of(line_before).floor then
        call('DEL', share_key(line_before, tenant))
      else
        write(share_key(line_before, tenant), {[before] = share[before]})
      end
      rank(line_before, tenant, share)
    else
      write(share_key(line_before, tenant), {[before] = share[before]})
    end
  end
  if after then
    call('SADD', P .. 'lines', line_after)
    local share = share_of(line_after, tenant)
    -- Whoever had nothing here starts at the least service of those that wait; a run that goes back is no return.
    local returns = share.flex + share.batch + share.running == 0 and before ~= 'running'
    if not share.vt or (returns and (after == 'flex' or after == 'batch')) then
      share.vt = max(share.vt or 0, line_of(line_after).floor)
    end
    share[after] = share[after] + 1
    call('HINCRBY', P .. 'line:' .. line_after, after, 1)
    write(share_key(line_after, tenant), {vt = share.vt, [after] = share[after]})
    rank(line_after, tenant, share)
  end
end

local function charge(row, units)
  if units == 0 then return end
  local share = share_of(row.line, row.tenant)
  if not share.vt then return end
  share.vt = share.vt + units / share.weight
  write(share_key(row.line, row.tenant), {vt = share.vt})
  rank(row.line, row.tenant, share)
end

local function weigh(line, tenant, weight)
  if call('EXISTS', share_key(line, tenant)) == 1 then write(share_key(line, tenant), {weight = weight}) end
end

local function ready_key(row) return P .. 'ready:' .. row.line .. '\0' .. row.tenant .. '\0' .. row.job_class end

-- The tenant with the least service, passing over who has more than half of what runs.
local function next_tenant(key, line, running)
  local first
  for _, tenant in ipairs(call('ZRANGE', key, 0, 3)) do
    local own = tonumber(call('HGET', share_key(line, tenant), 'running') or 0)
    if own + 1 <= 0.5 * (running + 1) then return tenant end
    first = first or tenant
  end
  return first
end

local function head(line, tenant, class)
  return call('ZRANGE', P .. 'ready:' .. line .. '\0' .. tenant .. '\0' .. class, 0, 0)[1]
end

local function pick(line)
  local found = line_of(line)
  if found.since_batch >= BATCH_EVERY - 1 then
    local tenant = next_tenant(P .. 'vt-batch:' .. line, line, found.running)
    if tenant then return load(head(line, tenant, 1)) end
  end
  local tenant = next_tenant(P .. 'vt:' .. line, line, found.running)
  if not tenant then return nil end
  local flex_id, batch_id = head(line, tenant, 0), head(line, tenant, 1)
  local flex, batch = flex_id and load(flex_id), batch_id and load(batch_id)
  if not (flex and batch) then return flex or batch end
  local has_aged = batch.queued_time + AGEING_S <= now
  return has_aged and batch.queued_time < flex.queued_time and batch or flex
end

local function served(row)
  local found = line_of(row.line)
  local vt = share_of(row.line, row.tenant).vt or 0
  write(P .. 'line:' .. row.line,
    {since_batch = row.job_class == 1 and 0 or found.since_batch + 1, floor = max(found.floor, vt)})
end

local function rate_of(found) return found.rate * math.exp(-max(0, now - found.rate_time) / 60) end

local function count_finish(line)
  write(P .. 'line:' .. line, {rate = rate_of(line_of(line)) + 1 / 60, rate_time = now})
end

-- Transitions.

-- Every index that a job is in, as it stands.
local function index(row, is_in)
  local function zset(key, score)
    if is_in then call('ZADD', P .. key, text(score), row.id) else call('ZREM', P .. key, row.id) end
  end
  local function set(key, member)
    call(is_in and 'SADD' or 'SREM', P .. key, member)
  end
  local turn = turn_of(row)
  if turn == 'flex' or turn == 'batch' then
    if is_in then call('ZADD', ready_key(row), text(row.seq), row.id) else call('ZREM', ready_key(row), row.id) end
  elseif turn == 'delayed' then zset('delayed', row.not_before_time)
  elseif turn == 'running' then
    zset('leases', row.lease_until_time)
    set('owned:' .. row.owner, row.id)
    if string.sub(row.line, 1, 1) == SUSPECT then set('alone:' .. row.owner, row.id) end
    if row.parent ~= '' then set('running:' .. row.parent, row.id) end
  end
  if row.parent ~= '' and WAITING[row.state] then
    zset('unstarted:' .. row.parent, row.position)
    if row.state == 'staged' then zset('staged:' .. row.parent, row.position) end
  end
end

local function bear(tenant, jobs, size)
  call('HINCRBY', P .. 'load:' .. tenant, 'jobs', jobs)
  call('HINCRBY', P .. 'load:' .. tenant, 'bytes', size)
end

local function count(state, jobs) call('HINCRBY', P .. 'tally', state, jobs) end

local function note(row, reason)
  if FINAL[row.state] or #row.history < 4000 then
    row.history = row.history .. string.format('%.6f %s %.0f %s %s\n', now, row.state, row.fence,
      row.owner == '' and '-' or row.owner, reason)
  end
end

local child_moved, settle_parent, end_parent  -- in queue_parents.lua

local function move(row, state, reason, changes)
  local before, line, turn, was_waiting = row.state, row.line, turn_of(row), WAITING[row.state]
  index(row, false)
  for name, value in pairs(changes) do
    if value == NONE then row[name] = nil else row[name] = value end
  end
  row.state = state
  note(row, reason)
  changes.state, changes.history = state, row.history
  write(job_key(row.id), changes)
  index(row, true)
  if changes.due_time then call('ZADD', P .. 'due', text(row.due_time), row.id) end
  shift(row.tenant, line, turn, row.line, turn_of(row))
  if was_waiting ~= WAITING[state] then
    local sign = WAITING[state] and 1 or -1
    bear(row.tenant, sign, sign * row.body_bytes)
  end
  if before ~= state then
    count(before, -1)
    count(state, 1)
    if row.parent ~= '' then child_moved(row.parent, before, state) end
  end
end

local function tell_one(subject, tenant, door, is_parent, state, webhook)
  -- The same news has the same id, should it be written again after Redis lost it.
  local id = 'msg_' .. string.sub(redis.sha1hex(subject .. ' ' .. state .. ' ' .. webhook), 1, 32)
  write(P .. 'news:' .. id, {id = id, subject = subject, tenant = tenant, door = door, is_parent = is_parent, state = state,
    webhook = webhook, created_time = now, attempts = 0, fence = 0, next_time = now, error = '', owner = ''})
  call('ZADD', P .. 'news-due', text(now), id)
  call('ZADD', P .. 'news-made', text(now), id)
  call('ZADD', P .. 'news-of:' .. subject, text(now), id)
end

local function tell(row, is_parent, state)
  for webhook in string.gmatch(row.webhook, '%S+') do
    tell_one(row.id, row.tenant, row.door, is_parent, state, webhook)
  end
end

local PAYLOAD = {'body', 'headers', 'caller', 'reservation', 'carried'}
local function payload_key(id) return P .. 'payload:' .. id end

-- how: state, reason, error, ledger_row, owner, status, result_bytes, units (nil: as charged), cost_nanousd, usage
local function finish_off(row, how)
  if row.lease_until_time then
    charge(row, (how.units or row.charged) - row.charged)
    count_finish(row.line)
  end
  move(row, how.state, how.reason, {
    owner = how.owner or '', lease_until_time = NONE, not_before_time = NONE, charged = 0, finished_time = now,
    due_time = now + row.keep_s, error = (how.error and how.error ~= '') and how.error or row.error,
    status = how.status or 0, result_bytes = how.result_bytes or 0, cost_nanousd = how.cost_nanousd or NONE,
    usage = how.usage or ''})
  local reservation = call('HGET', payload_key(row.id), 'reservation') or ''
  local ledger_row = how.ledger_row or ''
  if ledger_row ~= '' or reservation ~= '' then
    write(P .. 'settled:' .. row.id, {state = how.state, ledger_row = ledger_row, reservation = reservation, fence = 0, owner = ''})
    call('ZADD', P .. 'settled-due', text(now), row.id)
  end
  if how.state ~= 'dead' then call('DEL', payload_key(row.id)) end
  tell(row, 0, how.state)
end

local function requeue(row, reason, changes)
  if row.state == 'cancelling' then
    finish_off(row, {state = 'cancelled', reason = reason, units = 0})
    return
  end
  charge(row, -row.charged)
  changes.owner, changes.lease_until_time, changes.charged = '', NONE, 0
  move(row, 'queued', reason, changes)
end

local function lose_owner(row, reason)
  local deaths = row.deaths + 1
  if row.state == 'cancelling' then
    finish_off(row, {state = 'cancelled', reason = reason, units = 0})
  elseif deaths >= DEATHS_DEAD then
    row.deaths = deaths
    write(job_key(row.id), {deaths = deaths})
    finish_off(row, {state = 'dead', reason = reason, error = deaths .. ' processes died while they ran it'})
  else
    requeue(row, reason, {deaths = deaths, line = deaths >= DEATHS_SUSPECT and SUSPECT .. row.lane or row.line})
  end
  return row.state
end

local function expire(row)
  finish_off(row, {state = 'expired', reason = 'too late', error = 'nobody could run it in time', units = 0})
end

local function is_held(row, lease)
  return row and row.lease_until_time and row.fence == lease[2] and row.owner == lease[3]
end

-- `key` is what a job keeps as its scope: the scope and the fingerprint, in hex, with a colon between.
local function idempotency_key(key) return P .. 'idempotency:' .. string.match(key, '^%x+') end

local function subject_of(key)
  local found = call('HMGET', idempotency_key(key), 'key', 'subject')
  if found[1] and found[1] ~= key then return nil, {'conflict'} end
  return found[2]
end

local function remember(key, subject) call('HSET', idempotency_key(key), 'key', key, 'subject', subject) end

local function over_caps(tenant, limits, jobs, size)
  local found = call('HMGET', P .. 'load:' .. tenant, 'jobs', 'bytes')
  local waiting, waiting_bytes = tonumber(found[1] or 0), tonumber(found[2] or 0)
  if (limits.queued_jobs > 0 and waiting + jobs > limits.queued_jobs)
    or (limits.queued_bytes > 0 and waiting_bytes + size > limits.queued_bytes) then
    return {'full', text(waiting), text(waiting_bytes)}
  end
end

-- Of a new job: body, headers, caller, reservation, details, from ARGV[at] on.
local BINARIES = 5
local NOTHING = {'', '', '', '', ''}
local function content(at) return {unpack(ARGV, at, at + BINARIES - 1)} end

-- A new job: `job` has its plain fields.
local function insert(job, parts, placed)
  local seq = call('INCR', P .. 'seq')
  local submitted = job.submitted_time or now
  local expires = min(job.expires_time or (submitted + job.expires_in_s), placed.expires_time or 1e15)
  local row = {}
  for name, value in pairs(job) do row[name] = value end
  row.expires_in_s = nil
  row.seq, row.line, row.state, row.parent, row.position = seq, job.lane, placed.state, placed.parent, placed.position
  row.fence, row.attempts, row.runs, row.deaths, row.charged, row.status = 0, 0, 0, 0, 0, 0
  row.submitted_time, row.queued_time, row.expires_time, row.due_time = submitted, submitted, expires, expires
  row.result_bytes, row.is_purged, row.events, row.error, row.owner, row.usage = 0, 0, 0, '', '', ''
  row.replay_of, row.replayed_as, row.details = job.replay_of or '', '', parts[5]
  row.history = string.format('%.6f %s 0 - %s\n', now, placed.state, placed.reason or 'submitted')
  write(job_key(row.id), row)
  write(payload_key(row.id), {body = parts[1], headers = parts[2], caller = parts[3], reservation = parts[4], carried = ''})
  call('ZADD', P .. 'due', text(expires), row.id)
  call('ZADD', P .. 'jobs', seq, row.id)
  call('ZADD', P .. 'jobs-of:' .. row.tenant, seq, row.id)
  if row.parent ~= '' then call('ZADD', P .. 'children:' .. row.parent, row.position, row.id) end
  index(row, true)
  shift(row.tenant, row.line, nil, row.line, turn_of(row))
  bear(row.tenant, 1, row.body_bytes)
  count(row.state, 1)
  return row
end

-- By its epoch the caller knows whether this is the Redis it knew.
local META = P .. 'meta'
local epoch = call('HGET', META, 'epoch')

local do_verb = {}
