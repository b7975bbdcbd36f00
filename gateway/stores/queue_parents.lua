-- Parents. As gateway.stores.queue_parents, and what a job's transition means to its parent. Follows queue_core.lua.
local PARENT = {'seq', 'id', 'tenant', 'key_id', 'door', 'state', 'is_finalized', 'fence', 'owner', 'lease_until_time',
  'created_time', 'expires_time', 'due_time', 'keep_s', 'released_time', 'settled_time', 'cancelled_time', 'finished_time',
  'is_stopping', 'webhook', 'details', 'scope', 'total', unpack(STATES)}

local function parent_key(id) return P .. 'parent:' .. id end
local function load_parent(id, tenant)
  local row = read(parent_key(id), PARENT)
  if not row.id or (tenant and tenant ~= '' and tenant ~= row.tenant) then return nil end
  return row
end
local function shown_parent(id) return packed(call('HMGET', parent_key(id), unpack(PARENT))) end

local function at_work(row, is_in)
  if is_in then call('ZADD', P .. 'parents-at-work:' .. row.door, text(row.seq), row.id)
  else call('ZREM', P .. 'parents-at-work:' .. row.door, row.id) end
end

function child_moved(id, before, after)
  local key = parent_key(id)
  if call('EXISTS', key) == 0 then return end
  call('HINCRBY', key, before, -1)
  call('HINCRBY', key, after, 1)
  if FINAL[after] then settle_parent(load_parent(id)) end
end

function settle_parent(row)
  if row.state ~= 'in_progress' and row.state ~= 'cancelling' then return end
  if row.staged + row.queued + row.running + row.cancelling > 0 then return end
  -- After a loss of data some of its children may still be missing.
  if row.succeeded + row.failed + row.dead + row.cancelled + row.expired < row.total then return end
  row.settled_time = now
  write(parent_key(row.id), {settled_time = now, is_stopping = 0, owner = '', lease_until_time = NONE})
  call('SREM', P .. 'stopping', row.id)
  if row.is_finalized == 1 then
    row.state = 'finalizing'
    write(parent_key(row.id), {state = 'finalizing'})
    at_work(row, true)
    return
  end
  local state = 'completed'
  if row.cancelled_time then state = 'cancelled'
  elseif row.expired > 0 and row.expires_time <= now then state = 'expired' end
  end_parent(row, state)
end

function end_parent(row, state)
  row.state = state
  local is_stopping = row.staged + row.queued > 0
  write(parent_key(row.id), {state = state, finished_time = now, due_time = now + row.keep_s + FORGET_S,
    is_stopping = is_stopping and 1 or 0, lease_until_time = NONE})
  call('ZADD', P .. 'parents-due', text(now + row.keep_s + FORGET_S), row.id)
  call(is_stopping and 'SADD' or 'SREM', P .. 'stopping', row.id)
  at_work(row, false)
  tell(row, 1, state)
end

-- Binary: the parent's details first.
local function make(state, owner)
  local new, known = arg.parent, nil
  if new.scope then
    local refused
    known, refused = subject_of(new.scope)
    if refused then return nil, false, refused end
  end
  local found = load_parent(known or new.id, new.tenant)
  if found then return found, false end
  local row = {}
  for name, value in pairs(new) do row[name] = value end
  row.expires_in_s, row.announces = nil, nil
  local created = new.created_time or now
  row.seq, row.state, row.fence, row.owner = call('INCR', P .. 'seq'), state, 1, owner
  row.lease_until_time = owner ~= '' and now + LEASE_S or nil
  row.created_time = created
  row.expires_time = new.expires_time or created + new.expires_in_s
  row.due_time, row.is_stopping, row.total = row.expires_time, 0, 0
  row.released_time = state == 'in_progress' and now or nil
  row.details = ARGV[BINARY + 1]
  for _, each in ipairs(STATES) do row[each] = 0 end
  return row, true
end

local function put(row)
  write(parent_key(row.id), row)
  call('ZADD', P .. 'parents:' .. row.door, row.seq, row.id)
  call('ZADD', P .. 'parents-of:' .. row.tenant .. '\0' .. row.door, row.seq, row.id)
  call('ZADD', P .. 'parents-due', text(row.due_time), row.id)
  if row.state == 'validating' then at_work(row, true) end
  if row.owner ~= '' then call('SADD', P .. 'took:' .. row.owner, 'p' .. row.id) end
  if row.scope then remember(row.scope, row.id) end
end

-- That it was handed in. Who wrote its promise down before `announces` was known says nothing of it.
local function announce(row)
  for webhook in string.gmatch(arg.parent.announces or '', '%S+') do
    tell_one(row.id, row.tenant, row.door, 1, 'queued', webhook)
  end
end

local function sizes()
  local size = 0
  for _, job in ipairs(arg.jobs) do size = size + job.body_bytes end
  return #arg.jobs, size
end

-- Children at positions from the parent's total on; their binary parts begin at ARGV[at].
local function add(row, state, at)
  for n, job in ipairs(arg.jobs) do
    insert(job, content(at + (n - 1) * BINARIES), {state = state, parent = row.id, position = row.total + n - 1,
      expires_time = row.expires_time})
    weigh(job.lane, job.tenant, arg.limits.weight)
  end
  call('HINCRBY', parent_key(row.id), 'total', #arg.jobs)
  call('HINCRBY', parent_key(row.id), state, #arg.jobs)
end

function do_verb.submit_all()
  local row, is_new, refused = make('in_progress', '')
  if refused then return refused end
  if is_new then
    local jobs, size = sizes()
    refused = over_caps(row.tenant, arg.limits, jobs, size)
    if refused then return refused end
    put(row)
    announce(row)
    add(row, 'queued', BINARY + 2)
    settle_parent(load_parent(row.id))
  end
  return {'ok', is_new and 1 or 0, shown_parent(row.id)}
end

function do_verb.open_parent()
  local row, is_new, refused = make('validating', arg.owner)
  if refused then return refused end
  if is_new then put(row) end
  return {'ok', is_new and 1 or 0, shown_parent(row.id)}
end

local function held_parent(state)
  local row, lease = load_parent(arg.lease[1]), arg.lease
  if not row or row.fence ~= lease[2] or row.owner ~= lease[3] then return nil end
  if state and row.state ~= state then return nil end
  return row
end

local function renew(row) write(parent_key(row.id), {lease_until_time = now + LEASE_S}) end

function do_verb.renew_parent()
  local row = held_parent()
  if not row or (row.state ~= 'validating' and row.state ~= 'finalizing') then return {'lost'} end
  renew(row)
  return {'ok'}
end

function do_verb.append_children()
  local row = held_parent('validating')
  if not row then return {'lost'} end
  if arg.first ~= row.total then return {'order', row.total} end
  local jobs, size = sizes()
  local refused = over_caps(row.tenant, arg.limits, jobs, size)
  if refused then return refused end
  add(row, 'staged', BINARY + 1)
  renew(row)
  return {'ok', shown_parent(row.id)}
end

local function release_some(row, most)
  local ids = call('ZRANGE', P .. 'staged:' .. row.id, 0, most - 1)
  for _, id in ipairs(ids) do move(load(id), 'queued', 'released', {queued_time = now}) end
  return row.staged - #ids
end

function do_verb.release_parent()
  local row = held_parent('validating')
  if not row then return {'lost'} end
  local left = release_some(row, arg.most)
  if left > 0 then
    renew(row)
    return {'ok', left}
  end
  write(parent_key(row.id), {state = 'in_progress', released_time = now, lease_until_time = NONE})
  at_work(row, false)
  settle_parent(load_parent(row.id))
  return {'ok', 0}
end

function do_verb.fail_parent()
  local row = held_parent()
  if row and row.state == 'failed' then return {'ok', shown_parent(row.id)} end
  if not row or row.state ~= 'validating' then return {'lost'} end
  write(parent_key(row.id), {details = ARGV[BINARY + 1]})
  end_parent(row, 'failed')
  return {'ok', shown_parent(row.id)}
end

function do_verb.claim_parent()
  for _, id in ipairs(call('ZRANGE', P .. 'parents-at-work:' .. arg.door, 0, 99)) do
    local row = load_parent(id)
    if row and (not row.lease_until_time or row.lease_until_time <= now) then
      write(parent_key(id), {owner = arg.owner, fence = max(row.fence, tonumber(epoch) * EPOCH_FENCES) + 1,
        lease_until_time = now + LEASE_S})
      call('SADD', P .. 'took:' .. arg.owner, 'p' .. id)
      return {'ok', shown_parent(id)}
    end
  end
  return {'ok'}
end

function do_verb.finish_parent()
  local row = held_parent()
  if row and row.finished_time then return {'ok', shown_parent(row.id)} end
  if not row or row.state ~= 'finalizing' then return {'lost'} end
  write(parent_key(row.id), {details = ARGV[BINARY + 1]})
  end_parent(row, arg.state)
  return {'ok', shown_parent(row.id)}
end

local function stop_children(id, most)
  local ids = call('ZRANGE', P .. 'unstarted:' .. id, 0, most - 1)
  for _, child in ipairs(ids) do
    finish_off(load(child), {state = 'cancelled', reason = 'its parent was', units = 0})
  end
  if #ids < most then
    write(parent_key(id), {is_stopping = 0})
    call('SREM', P .. 'stopping', id)
  end
  return #ids
end

function do_verb.cancel_parent()
  local row = load_parent(arg.id, arg.tenant)
  if not row then return {'ok'} end
  if row.state == 'validating' or row.state == 'in_progress' then
    at_work(row, false)
    write(parent_key(row.id), {state = 'cancelling', cancelled_time = now, is_stopping = 1, lease_until_time = NONE})
    call('SADD', P .. 'stopping', row.id)
    for _, id in ipairs(call('SMEMBERS', P .. 'running:' .. row.id)) do
      local child = load(id)
      if child.state == 'running' then move(child, 'cancelling', 'its parent was cancelled', {}) end
    end
    stop_children(row.id, 100)
    settle_parent(load_parent(row.id))
  end
  return {'ok', shown_parent(row.id)}
end

function do_verb.get_parent()
  local row = load_parent(arg.id, arg.tenant)
  return {'ok', row and shown_parent(row.id)}
end

function do_verb.list_parents()
  local key = arg.tenant == '' and P .. 'parents:' .. arg.door or P .. 'parents-of:' .. arg.tenant .. '\0' .. arg.door
  local before = arg.after ~= '' and call('ZSCORE', key, arg.after)
  local ids = call('ZREVRANGEBYSCORE', key, before and '(' .. before or '+inf', '-inf', 'LIMIT', 0, arg.limit + 1)
  local found = {}
  for _, id in ipairs(ids) do found[#found + 1] = shown_parent(id) end
  return {'ok', found}
end
