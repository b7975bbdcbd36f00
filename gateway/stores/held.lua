-- Held jobs, on all nodes; what gateway.stores.held_sqlite does. KEYS: all jobs by the end of their audience
-- (member: the job's id), what is known of each (hash: id -> tenant NUL scope), those of the scope at hand by age (zset).
local verb, ends, known, scope = ARGV[1], KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6

if verb == 'hold' then
  redis.call('HSETNX', known, ARGV[2], ARGV[3])
  redis.call('ZADD', ends, now + ARGV[4], ARGV[2])
  redis.call('ZADD', scope, 'NX', now, ARGV[2])
  redis.call('EXPIRE', scope, 604800)
elseif verb == 'leave' then
  local ends_at = redis.call('ZSCORE', ends, ARGV[2])
  if ends_at and tonumber(ends_at) > now then redis.call('ZADD', ends, now, ARGV[2]) end
elseif verb == 'forget' then
  redis.call('ZREM', ends, ARGV[2])
  redis.call('ZREM', scope, ARGV[2])
  redis.call('HDEL', known, ARGV[2])
elseif verb == 'take_up' then
  for _, job in ipairs(redis.call('ZRANGE', scope, 0, 99)) do
    local ends_at = redis.call('ZSCORE', ends, job)
    if not ends_at then
      redis.call('ZREM', scope, job)
    elseif tonumber(ends_at) <= now then
      redis.call('ZADD', ends, now + ARGV[2], job)
      return {job, redis.call('HGET', known, job)}
    end
  end
  return {}
elseif verb == 'is_any' then
  return redis.call('ZCARD', ends)
elseif verb == 'abandoned' then
  local found = {}
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now - ARGV[2], 'LIMIT', 0, ARGV[3])) do
    table.insert(found, job)
    table.insert(found, redis.call('HGET', known, job))
    redis.call('ZREM', ends, job)
    redis.call('HDEL', known, job)
  end
  return found
end
return 1
