"""The scripts that run inside Redis, each atomically: compare, then swap.

A sequence is a hash: `claim_id`, `is_alive`, `epoch`, `step`, `data` (the
checkpoint), `head` (fields that no script reads) and `ending`. When it expires is in
one sorted set, in milliseconds of the store's own clock. A TTL would follow the
machine's clock, and delete live sequences when that clock jumps.
"""

_CLOCK = """
local now = tonumber(redis.call('HGET', KEYS[1], 'milliseconds') or '0')
local function expire(key, milliseconds)
    redis.call('ZADD', KEYS[2], string.format('%.0f', now + milliseconds), key)
end
local function is_under(key, claim_id)
    local found = redis.call('HMGET', key, 'claim_id', 'is_alive', 'step')
    return found[2] == '1' and found[1] == claim_id, found
end
"""

# KEYS: sequences. The header of each; its values are nil where there is none.
READ = """
local headers = {}
for i, key in ipairs(KEYS) do
    headers[i] = redis.call('HMGET', key,
        'claim_id', 'is_alive', 'epoch', 'step', 'head', 'ending')
end
return headers
"""

# KEYS: one sequence.
READ_DATA = "return redis.call('HMGET', KEYS[1], 'is_alive', 'epoch', 'step', 'data')"

# KEYS: expiries. ARGV: cursor, how many. The next cursor; then names and scores in turns.
SCAN = "return redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])"

# KEYS: clock, expiries, epoch, sequences. ARGV: lifetime, and of each sequence: the
# claim_id, is_alive and step it was found with; claim_id, head, whether the epoch
# rises, and the checkpoint's step and data (an empty step: the one there stands).
# Each is answered with its epoch and data, or with nothing if it has changed since.
CLAIM = f"""{_CLOCK}
local answers = {{}}
for i = 4, #KEYS do
    local key, at = KEYS[i], 2 + (i - 4) * 8
    local found = redis.call('HMGET', key, 'claim_id', 'is_alive', 'step')
    if (found[1] or '') == ARGV[at] and (found[2] or '') == ARGV[at + 1]
            and (found[3] or '') == ARGV[at + 2] then
        redis.call('HSET', key, 'claim_id', ARGV[at + 3], 'is_alive', '1',
            'head', ARGV[at + 4], 'ending', '')
        if ARGV[at + 5] == '1' then
            redis.call('HSET', key, 'epoch', string.format('%.0f', redis.call('INCR', KEYS[3])))
        end
        if ARGV[at + 6] ~= '' then
            redis.call('HSET', key, 'step', ARGV[at + 6], 'data', ARGV[at + 7])
        end
        expire(key, tonumber(ARGV[1]))
        answers[i - 3] = redis.call('HMGET', key, 'epoch', 'data')
    else
        answers[i - 3] = false
    end
end
return answers
"""

# KEYS: clock, expiries, sequences. ARGV, of each: claim_id, step, data.
WRITE = f"""{_CLOCK}
local verdicts = {{}}
for i = 3, #KEYS do
    local key, at = KEYS[i], 1 + (i - 3) * 3
    local is_owner, found = is_under(key, ARGV[at])
    if is_owner and tonumber(ARGV[at + 1]) >= tonumber(found[3]) then
        redis.call('HSET', key, 'step', ARGV[at + 1], 'data', ARGV[at + 2])
    end
    verdicts[i - 2] = is_owner and 1 or 0
end
return verdicts
"""

# KEYS: clock, expiries, sequences. ARGV: lifetime of a tombstone; of each: claim_id, ending.
CLOSE = f"""{_CLOCK}
local verdicts = {{}}
for i = 3, #KEYS do
    local key, at = KEYS[i], 2 + (i - 3) * 2
    local found = redis.call('HMGET', key, 'claim_id', 'is_alive')
    local is_owner = found[1] == ARGV[at]
    if found[2] == '1' and (is_owner or ARGV[at] == '') then
        redis.call('HSET', key, 'is_alive', '0', 'ending', ARGV[at + 1])
        redis.call('HDEL', key, 'data')
        expire(key, tonumber(ARGV[1]))
        verdicts[i - 2] = 1
    else
        verdicts[i - 2] = found[2] == '0' and is_owner and 1 or 0
    end
end
return verdicts
"""

# KEYS: clock, expiries, sequences. ARGV: lifetime; of each: claim_id.
RENEW_LEASE = f"""{_CLOCK}
local verdicts = {{}}
for i = 3, #KEYS do
    local is_owner = is_under(KEYS[i], ARGV[i - 1])
    if is_owner then
        expire(KEYS[i], tonumber(ARGV[1]))
    end
    verdicts[i - 2] = is_owner and 1 or 0
end
return verdicts
"""

# KEYS: clock, expiries. ARGV: the most that one tick adds, how many to forget at once.
# How many have been forgotten.
TICK = """
local time = redis.call('TIME')
local machine = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local seen = redis.call('HMGET', KEYS[1], 'milliseconds', 'machine')
local passed = machine - tonumber(seen[2] or machine)
local now = tonumber(seen[1] or '0') + math.max(0, math.min(passed, tonumber(ARGV[1])))
redis.call('HSET', KEYS[1], 'milliseconds', string.format('%.0f', now),
    'machine', string.format('%.0f', machine))
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now),
    'LIMIT', 0, ARGV[2])
for _, key in ipairs(expired) do
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[2], key)
end
return #expired
"""
