-- Rows of one node's ledger, appended to the stream once: the position is kept with the rows, and moves with them.
--
-- KEYS: 1 stream, 2 positions by node, 3 positions asked for again, 4 facts, 5 who ships for this node.
-- ARGV: 1 node, 2 who ships, 3 position before the rows, 4 position after, 5 the rows (empty: none), 6 an epoch, should
-- this be the first call ever, 7 entries kept.
-- Returns the position to go on from, and whether the rows were taken; -1: another one ships for this node.

local node, shipper, from, to, rows = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local owner = redis.call('GET', KEYS[5])
if owner and owner ~= shipper then return {-1, 0} end
redis.call('SET', KEYS[5], shipper, 'PX', 5000)
redis.call('HSETNX', KEYS[4], 'epoch', ARGV[6])

local position = redis.call('HGET', KEYS[2], node)
local wanted = redis.call('HGET', KEYS[3], node)
if wanted then
    redis.call('HDEL', KEYS[3], node)
    if position and tonumber(wanted) < tonumber(position) then
        redis.call('HSET', KEYS[2], node, wanted)
        return {tonumber(wanted), 0}
    end
end
if position and position ~= from then return {tonumber(position), 0} end
if rows == '' then
    if not position then redis.call('HSET', KEYS[2], node, from) end
    return {tonumber(from), 0}
end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[7], '*', 'node', node, 'from', from, 'to', to, 'rows', rows)
redis.call('PEXPIRE', KEYS[1], 86400000)
redis.call('HSET', KEYS[2], node, to)
return {tonumber(to), 1}
