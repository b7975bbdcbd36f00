-- Jobs: handed in, claimed, renewed, ended, cancelled, replayed. As gateway.stores.queue_jobs. Follows queue_parents.lua.
function do_verb.submit()
  local job, known = arg.job, nil
  if job.scope then
    local refused
    known, refused = subject_of(job.scope)
    if refused then return refused end
  end
  local id = known or job.id
  if call('HGET', job_key(id), 'tenant') == job.tenant then return {'ok', 0, shown(id)} end
  local refused = over_caps(job.tenant, arg.limits, 1, job.body_bytes)
  if refused then return refused end
  local row = insert(job, content(BINARY + 1), {state = 'queued', parent = '', position = 0})
  weigh(row.line, row.tenant, arg.limits.weight)
  if job.scope then remember(job.scope, job.id) end
  return {'ok', 1, shown(job.id)}
end

local function is_stopped(parent)
  local state = call('HGET', P .. 'parent:' .. parent, 'state')
  return state == 'cancelling' or state == 'failed' or state == 'cancelled' or state == 'expired'
end

function do_verb.claim()
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'delayed', '-inf', text(now), 'LIMIT', 0, 50)) do
    move(load(id), 'queued', 'its time has come', {not_before_time = NONE})
  end
  -- After a loss of data: until the nodes have said what there was.
  if now < tonumber(call('HGET', META, 'open_time') or 0) then return {'ok'} end
  local owner, line = arg.owner, arg.lane
  if call('EXISTS', P .. 'alone:' .. owner) == 1 then return {'ok'} end
  if arg.is_alone then
    if call('EXISTS', P .. 'owned:' .. owner) == 1 then return {'ok'} end
    line = SUSPECT .. line
  end
  for _ = 1, 100 do
    local row = pick(line)
    if not row then return {'ok'} end
    if row.expires_time <= now then expire(row)
    elseif row.parent ~= '' and is_stopped(row.parent) then
      finish_off(row, {state = 'cancelled', reason = 'its parent was', units = 0})
    else
      served(row)
      move(row, 'running', 'claimed', {
        fence = max(row.fence, tonumber(epoch) * EPOCH_FENCES) + 1, runs = row.runs + 1, owner = owner,
        lease_until_time = now + LEASE_S, started_time = now, charged = row.estimate})
      charge(row, row.estimate)
      return {'ok', shown(row.id), packed(call('HMGET', payload_key(row.id), unpack(PAYLOAD)))}
    end
  end
  return {'ok'}
end

function do_verb.renew()
  local found = {}
  for _, lease in ipairs(arg.leases) do
    local row = load(lease[1])
    if is_held(row, lease) then
      write(job_key(row.id), {lease_until_time = now + LEASE_S})
      call('ZADD', P .. 'leases', text(now + LEASE_S), row.id)
      found[#found + 1] = row.id
      found[#found + 1] = row.state
    end
  end
  return {'ok', found}
end

-- Binary: result's headers and body, ledger row, usage.
local function keep_answer(row)
  if arg.answer then
    call('HSET', P .. 'result:' .. row.id, 'headers', ARGV[BINARY + 1], 'body', ARGV[BINARY + 2], 'file', arg.answer.file)
  end
end

local function ending(state, reason)
  local answer = arg.answer or {}
  return {state = state, reason = reason, error = arg.error, ledger_row = ARGV[BINARY + 3], owner = arg.lease[3],
    status = answer.status, result_bytes = answer.size, units = arg.units, cost_nanousd = arg.cost_nanousd,
    usage = ARGV[BINARY + 4]}
end

function do_verb.finish()
  local row, lease = load(arg.lease[1]), arg.lease
  if row and FINAL[row.state] and row.fence == lease[2] and row.owner == lease[3] then
    return {'ok', 0, shown(row.id)}
  end
  if not is_held(row, lease) then return {'lost'} end
  keep_answer(row)
  finish_off(row, ending(arg.state, 'finished'))
  return {'ok', 1, shown(row.id)}
end

-- Binary: as finish, then `carried` where arg.is_carried.
function do_verb.fail()
  local row = load(arg.lease[1])
  if not is_held(row, arg.lease) then return {'lost'} end
  row.attempts, row.error = row.attempts + arg.counted, arg.error
  write(job_key(row.id), {attempts = row.attempts, error = row.error})
  if arg.is_carried then call('HSET', payload_key(row.id), 'carried', ARGV[BINARY + 5]) end
  local is_last = row.attempts >= row.max_attempts
  local not_before = now + max(0, arg.retry_in_s)
  if row.state ~= 'cancelling' and not is_last and not_before < row.expires_time then
    charge(row, arg.units or row.charged)
    requeue(row, 'failed', {not_before_time = not_before})
    return {'ok', 0, shown(row.id)}
  end
  local state = is_last and 'dead' or 'expired'
  if row.state == 'cancelling' then state = 'cancelled' end
  keep_answer(row)
  finish_off(row, ending(state, 'failed'))
  return {'ok', 1, shown(row.id)}
end

function do_verb.release()
  local found = {}
  for _, lease in ipairs(arg.leases) do
    local row = load(lease[1])
    if is_held(row, lease) then
      requeue(row, 'released', {not_before_time = arg.retry_in_s > 0 and now + arg.retry_in_s or NONE})
      found[#found + 1] = row.id
    end
  end
  return {'ok', found}
end

function do_verb.owner_died()
  local owner = arg.owner
  local leased = call('SMEMBERS', P .. 'owned:' .. owner)
  for _, id in ipairs(leased) do lose_owner(load(id), 'its owner died') end
  for _, what in ipairs(call('SMEMBERS', P .. 'took:' .. owner)) do
    local kind, id = string.sub(what, 1, 1), string.sub(what, 2)
    if kind == 's' and call('HGET', P .. 'settled:' .. id, 'owner') == owner then
      call('ZADD', P .. 'settled-due', 'XX', text(now), id)
    elseif kind == 'n' and call('HGET', P .. 'news:' .. id, 'owner') == owner then
      if call('ZADD', P .. 'news-due', 'XX', 'CH', text(now), id) == 1 then write(P .. 'news:' .. id, {next_time = now}) end
    elseif kind == 'p' and call('HGET', P .. 'parent:' .. id, 'owner') == owner then
      call('HDEL', P .. 'parent:' .. id, 'lease_until_time')
    end
  end
  call('DEL', P .. 'took:' .. owner)
  return {'ok', #leased}
end

function do_verb.cancel()
  local row = load(arg.id, arg.tenant)
  if not row then return {'ok'} end
  if WAITING[row.state] then finish_off(row, {state = 'cancelled', reason = 'cancelled', units = 0})
  elseif row.state == 'running' then move(row, 'cancelling', 'cancelled', {}) end
  return {'ok', shown(row.id)}
end

function do_verb.append_events()
  local row = load(arg.lease[1])
  if not is_held(row, arg.lease) then return {'lost'} end
  if arg.first ~= row.events then return {'order', row.events} end
  for at = 1, arg.count do
    call('RPUSH', P .. 'events:' .. row.id, text(row.fence) .. ':' .. ARGV[BINARY + at])
  end
  write(job_key(row.id), {events = row.events + arg.count})
  return {'ok'}
end

-- Binary: body, headers, caller as the new job has them, then nothing reserved, then the details.
function do_verb.replay()
  local row = load(arg.id)
  if not row or row.state ~= 'dead' or row.is_purged == 1 then return {'ok'} end
  if row.replayed_as ~= '' then return {'ok', 0, shown(row.replayed_as)} end
  local again = {id = arg.again, replay_of = row.id, expires_in_s = row.expires_time - row.submitted_time}
  for _, name in ipairs({'tenant', 'key_id', 'lane', 'model', 'path', 'door', 'job_class', 'is_stream', 'max_attempts', 'keep_s',
    'body_bytes', 'estimate', 'reference', 'webhook'}) do again[name] = row[name] end
  insert(again, content(BINARY + 1), {state = 'queued', parent = '', position = 0, reason = 'replayed'})
  write(job_key(row.id), {replayed_as = arg.again})
  return {'ok', 1, shown(arg.again)}
end

function do_verb.take_settled()
  local found = {}
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'settled-due', '-inf', text(now), 'LIMIT', 0, arg.most)) do
    local key = P .. 'settled:' .. id
    local fence = call('HINCRBY', key, 'fence', 1)
    call('HSET', key, 'owner', arg.owner)
    call('SADD', P .. 'took:' .. arg.owner, 's' .. id)
    call('ZADD', P .. 'settled-due', text(now + LEASE_S), id)
    local row = call('HMGET', key, 'state', 'ledger_row', 'reservation')
    found[#found + 1] = {id, row[1], row[2], row[3], fence}
  end
  return {'ok', found}
end

function do_verb.ack_settled()
  local found = {}
  for _, row in ipairs(arg.rows) do
    local id, key = row[1], P .. 'settled:' .. row[1]
    local owner = call('HGET', key, 'owner')
    if tonumber(call('HGET', key, 'fence') or -1) == row[2] and call('ZREM', P .. 'settled-due', id) == 1 then
      call('HSET', key, 'ledger_row', '', 'reservation', '')
      if owner then call('SREM', P .. 'took:' .. owner, 's' .. id) end
      found[#found + 1] = id
    end
  end
  return {'ok', found}
end

function do_verb.take_news()
  local found = {}
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'news-due', '-inf', text(now), 'LIMIT', 0, arg.most)) do
    local key, until_time = P .. 'news:' .. id, now + 2 * LEASE_S
    call('HINCRBY', key, 'fence', 1)
    write(key, {owner = arg.owner, next_time = until_time})
    call('SADD', P .. 'took:' .. arg.owner, 'n' .. id)
    call('ZADD', P .. 'news-due', text(until_time), id)
    found[#found + 1] = packed(call('HMGET', key, unpack(arg.fields)))
  end
  return {'ok', found}
end

-- arg.next_time: in so many seconds; nil: never. arg.is_delivered.
function do_verb.end_news()
  local key = P .. 'news:' .. arg.id
  local owner = call('HGET', key, 'owner')
  if tonumber(call('HGET', key, 'fence') or -1) ~= arg.fence or not call('ZSCORE', P .. 'news-due', arg.id) then
    return {'ok'}
  end
  if owner then call('SREM', P .. 'took:' .. owner, 'n' .. arg.id) end
  if arg.is_delivered then
    write(key, {next_time = NONE, delivered_time = now, error = '', owner = ''})
    call('ZREM', P .. 'news-due', arg.id)
    return {'ok'}
  end
  call('HINCRBY', key, 'attempts', arg.counted)
  if arg.retry_in_s then
    write(key, {next_time = now + arg.retry_in_s, error = arg.error, owner = ''})
    call('ZADD', P .. 'news-due', text(now + arg.retry_in_s), arg.id)
  else
    write(key, {next_time = NONE, error = arg.error, owner = ''})
    call('ZREM', P .. 'news-due', arg.id)
    call('ZADD', P .. 'news-dead', text(now), arg.id)
  end
  return {'ok'}
end

function do_verb.replay_news()
  local key = P .. 'news:' .. arg.id
  if call('EXISTS', key) == 0 then return {'ok', 0} end
  call('HINCRBY', key, 'fence', 1)
  write(key, {next_time = now, delivered_time = NONE, attempts = 0, owner = '', error = ''})
  call('ZADD', P .. 'news-due', text(now), arg.id)
  call('ZREM', P .. 'news-dead', arg.id)
  return {'ok', 1}
end
