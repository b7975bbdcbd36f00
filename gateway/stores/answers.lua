-- Answers kept for `Idempotency-Key`; what gateway.stores.answer_table does, for many nodes.
-- KEYS: the answer's hash, the index of all (by expiry; member: scope:bytes), the sum of their bytes.
-- A hash has f (fingerprint), o (owner), k (ms to keep), and once answered s (status), r, h, b, t.
-- While the request runs the hash lives as long as its lease: a dead owner's claim ends by itself.
local verb, answer, index, sum = ARGV[1], KEYS[1], KEYS[2], KEYS[3]

if verb == 'claim' then
  local found = redis.call('HMGET', answer, 'f', 's')
  if not found[1] then
    redis.call('HSET', answer, 'f', ARGV[2], 'o', ARGV[3], 'k', ARGV[5])
    redis.call('PEXPIRE', answer, ARGV[4])
    return {'mine'}
  end
  if found[1] ~= ARGV[2] then return {'other_body'} end
  if not found[2] then return {'running'} end
  return {'done', redis.call('HMGET', answer, 'r', 's', 'h', 'b', 't')}
end

local claim = redis.call('HMGET', answer, 'o', 's', 'k')
if claim[1] ~= ARGV[2] or claim[2] then return 0 end
if verb == 'renew' then
  redis.call('PEXPIRE', answer, ARGV[3])
elseif verb == 'release' then
  redis.call('DEL', answer)
else
  local time = redis.call('TIME')
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  local size, most = #ARGV[6], tonumber(ARGV[9])
  redis.call('HSET', answer, 'r', ARGV[3], 's', ARGV[4], 'h', ARGV[5], 'b', ARGV[6], 't', ARGV[7])
  redis.call('PEXPIRE', answer, claim[3])
  redis.call('ZADD', index, now_ms + claim[3], ARGV[8] .. ':' .. size)
  local total = redis.call('INCRBY', sum, size)
  -- What has expired, then the oldest of what has not, but never the answer at hand.
  for _ = 1, 1000 do
    local first = redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
    if not first[1] or (tonumber(first[2]) > now_ms and total <= most) then break end
    local scope, bytes = string.match(first[1], '^(.*):(%d+)$')
    redis.call('ZREM', index, first[1])
    if tonumber(first[2]) > now_ms then redis.call('DEL', ARGV[10] .. scope) end
    total = redis.call('DECRBY', sum, bytes)
  end
end
return 1
