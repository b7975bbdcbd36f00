-- What nodes say from their journals after Redis lost something. Everything here may be said again, by several, in any order.
-- Follows queue_sweep.lua, and is the last part.

-- Which Redis this is: the millisecond at which it was first met, or more. One that is new, was restarted or took over from another gets another epoch: nodes that meet it say
-- what they have promised. Until open_time nothing is claimed, so that what has ended is said before what has not.
function do_verb.begin()
  if not epoch or call('HGET', META, 'run_id') ~= arg.run_id then
    epoch = text(max(floor(now * 1000), tonumber(epoch or 0) + 1, arg.known + 1))
    call('HSET', META, 'epoch', epoch, 'run_id', arg.run_id, 'open_time', text(now + arg.grace_s))
  end
  return {'ok', epoch}
end

local function restored(job, parts, state)
  local parent = job.parent ~= '' and load_parent(job.parent)
  local row = insert(job, parts, {state = state, parent = job.parent, position = job.position, reason = 'restored'})
  if parent then
    call('HINCRBY', parent_key(parent.id), state, 1)
    write(parent_key(parent.id), {total = max(parent.total, job.position + 1)})
  end
  if job.scope then remember(job.scope, job.id) end
  return row
end

-- A job that was promised and has not ended as far as its node knows. Binary: as submit.
function do_verb.restore_job()
  local job = arg.job
  if load(job.id) then return {'ok', 0} end
  local parent = job.parent ~= '' and load_parent(job.parent)
  local is_staged = job.parent ~= '' and (not parent or parent.state == 'validating')
  restored(job, content(BINARY + 1), is_staged and 'staged' or 'queued')
  return {'ok', 1}
end

-- A job's end. arg.is_intent: its node does not know whether it was taken; then a run under way elsewhere goes on.
-- Binary: as finish. Returns whether this is its end.
function do_verb.restore_end()
  local job, lease = arg.job, arg.lease
  local row = load(job.id)
  if row and FINAL[row.state] then
    return {'ok', row.fence == lease[2] and row.owner == lease[3] and 1 or 0}
  end
  if row and row.lease_until_time and arg.is_intent and not is_held(row, lease) then return {'ok', 0} end
  if not row then
    restored(job, NOTHING, 'queued')  -- nothing of its request is needed any more
    row = load(job.id)
  end
  keep_answer(row)
  local how = ending(arg.state, 'restored')
  if row.lease_until_time then index(row, false); row.fence = lease[2]; index(row, true) else row.fence = lease[2] end
  write(job_key(row.id), {fence = lease[2]})
  finish_off(row, how)
  return {'ok', 1}
end

-- arg.parent as in open_parent, with its absolute times. Binary: its details.
function do_verb.restore_parent()
  if load_parent(arg.parent.id) then return {'ok', 0} end
  local row = make(arg.state, '')
  row.total = arg.total
  for _, id in ipairs(call('ZRANGE', P .. 'children:' .. row.id, 0, -1)) do
    local child = call('HGET', job_key(id), 'state')
    if child then row[child] = row[child] + 1 end
  end
  put(row)
  announce(row)
  settle_parent(load_parent(row.id))
  return {'ok', 1}
end

-- Staged children are released; how many are left, or -1: the parent is not here yet.
function do_verb.restore_release()
  local row = load_parent(arg.id)
  if not row then return {'ok', -1} end
  write(parent_key(row.id), {total = max(row.total, arg.total)})
  if row.state ~= 'validating' then return {'ok', 0} end
  local left = release_some(row, arg.most)
  if left <= 0 then
    write(parent_key(row.id), {state = 'in_progress', released_time = now, lease_until_time = NONE})
    at_work(row, false)
    settle_parent(load_parent(row.id))
  end
  return {'ok', max(0, left)}
end

-- The parent ended so. Binary: its details.
function do_verb.restore_parent_end()
  local row = load_parent(arg.id)
  if not row then return {'ok', -1} end
  if row.finished_time then return {'ok', 0} end
  write(parent_key(row.id), {details = ARGV[BINARY + 1]})
  end_parent(row, arg.state)
  return {'ok', 1}
end

-- Which of these jobs were purged: nothing of them is to be anywhere.
function do_verb.purged()
  local found = {}
  for _, id in ipairs(arg.ids) do
    if call('HGET', job_key(id), 'is_purged') == '1' then found[#found + 1] = id end
  end
  return {'ok', found}
end

-- Which of these jobs have ended, or were forgotten; with the job where no node has written its end down.
function do_verb.ended()
  local found = {}
  for _, id in ipairs(arg.ids) do
    local state = call('HGET', job_key(id), 'state')
    if not state then found[#found + 1] = {id, ''}
    elseif FINAL[state] then
      found[#found + 1] = {id, (state == 'dead' or state == 'expired') and shown(id) or ''}
    end
  end
  return {'ok', found}
end

local answers, at = {}, 5
for n = 1, tonumber(ARGV[4]) do
  local verb = ARGV[at]
  arg, BINARY = cmsgpack.unpack(ARGV[at + 1]), at + 2
  at = at + 3 + tonumber(ARGV[at + 2])
  if verb ~= 'begin' and epoch ~= ARGV[2] then answers[n] = {'epoch', epoch or ''}
  else answers[n] = do_verb[verb]() end
end
return answers
