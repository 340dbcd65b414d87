-- A record is one hash, readable with redis-cli: head, fingerprint, nonce, birth (absent while it is the nonce),
-- tenant, trace, result, and step:<name> for each checkpoint. The head is ten decimal numbers:
--   state token lease_until expires_at retention steps counts first_seen attempt deaths
-- with times and durations in microseconds; steps says whether there are any. In progress, or released and not settled,
-- it has no TTL; settled it ends by PEXPIREAT. Numbers go through %.0f: Lua would write 1.7e+15.
local call, pcall, format, match, sub = redis.call, redis.pcall, string.format, string.match, string.sub

local HEAD = '^([1-4]) (%d+) (%d+) (%d+) (%d+) ([01]) ([01]) (%d+) (%d+) (%d+)$'
local HEAD_FORMAT = '%s %.0f %.0f %.0f %.0f %s %s %.0f %d %d'
local IN_PROGRESS, RELEASED, COMPLETED, TOMBSTONE = '1', '2', '3', '4'

-- Whether a released record has no outcome: something was kept, or an earlier attempt ended unknown.
local function unsettled(state, steps, attempt)
  return state == RELEASED and (steps == '1' or attempt ~= '1')
end

local time = call('TIME')
local now = time[1] * 1000000 + time[2]

-- A replica would answer from what it has; a write that changes nothing is refused there.
local function refused_by_a_replica()
  local answer = pcall('HDEL', KEYS[1], '')
  if type(answer) == 'table' and string.find(answer.err, 'READONLY', 1, true) then
    return answer
  end
end
