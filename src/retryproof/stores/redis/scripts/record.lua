-- A record is one hash, readable with redis-cli: head, fingerprint, nonce, birth (absent while it is the nonce),
-- tenant, trace, result, and step:<name> for each checkpoint. The head is ten decimal numbers:
--   state, token, lease_until, expires_at, first_seen, retention, attempt, deaths, counts, whether there are steps
-- with times and durations in microseconds. In progress it has no TTL; settled or released it ends by PEXPIREAT.
-- Numbers go through %.0f: Lua would write 1.7e+15.
local HEAD = '^([1-4]) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) ([01]) ([01])$'
local HEAD_FORMAT = '%s %.0f %.0f %.0f %.0f %.0f %d %d %s %s'
local IN_PROGRESS, RELEASED, COMPLETED, TOMBSTONE = '1', '2', '3', '4'

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- A replica would answer from what it has; a write that changes nothing is refused there.
local function refused_by_a_replica()
  local answer = redis.pcall('HDEL', KEYS[1], '')
  if type(answer) == 'table' and string.find(answer.err, 'READONLY', 1, true) then
    return answer
  end
end

local function expire(key, at)
  redis.call('PEXPIREAT', key, string.format('%.0f', math.ceil(at / 1000)))
end
