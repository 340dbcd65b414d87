-- A record is one string. `core/record.py` says what its parts mean; packed.py reads it in Python. Numbers are
-- little-endian, times and durations are microseconds as doubles (`d`), as all numbers are in Lua: exact to 2^53.
--    1 format, this is 1     19 counts (0, 1)    36 first_seen d    68 length of the fingerprint
--    2 state                 20 attempt I4       44 token d         69 length of the birth, 0 while it is the nonce
--    3 expires_at d          24 deaths I4        52 nonce           70 length of the tenant
--   11 lease_until d         28 retention d                         71 length of the trace I4
-- Fingerprint, birth, tenant and trace follow from 75; then the result of a completed record, or the checkpoints of one
-- that is not: for each the length of the name I4, of the value I4, name, value. The last one under a name counts, so a
-- checkpoint is appended, and nothing that is there is written again.
-- In progress, or released and not settled, a record has no TTL; settled it ends by one, just after its retention.
local call, pcall, byte, char, format, sub = redis.call, redis.pcall, string.byte, string.char, string.format, string.sub
local pack, parse, find = struct.pack, struct.unpack, string.find

local FORMAT = 1
local IN_PROGRESS, RELEASED, COMPLETED, TOMBSTONE = 1, 2, 3, 4
local HEAD = '<BBddBI4I4ddd'
local FENCE, NONCE, LENGTHS, NAMES, HEAD_END = 44, 52, 68, 75, '73'

-- Its state, or nothing where it is none of ours, or of a form that this version cannot read.
local function state_of(record)
  local found, state = byte(record, 1, 2)
  if #record >= NAMES - 1 and found == FORMAT and state >= IN_PROGRESS and state <= TOMBSTONE then
    return state
  end
end

-- Where the result or the first checkpoint begins.
local function tail(record)
  local fingerprint, birth, tenant, a, b, c, d = byte(record, LENGTHS, NAMES - 1) -- `parse` takes twice as long
  return NAMES + fingerprint + birth + tenant + a + 256 * (b + 256 * (c + 256 * d))
end

-- Whether a released record has no outcome: something was kept, or an earlier attempt ended unknown.
local function unsettled(state, record)
  return state == RELEASED and (parse('<I4', record, 20) ~= 1 or #record >= tail(record))
end

-- Records were hashes before: fields `head` (ten decimal numbers), `fingerprint`, `nonce` and, where there is one,
-- `birth`, `tenant`, `trace`, `result` and `step:<name>`. One is read as the string that the next write makes of it.
local OLD_HEAD = '^([1-4]) (%d+) (%d+) (%d+) (%d+) [01] ([01]) (%d+) (%d+) (%d+)$'

local function from_hash(key)
  local fields = pcall('HGETALL', key)
  if fields.err then
    return '' -- of another type: unreadable
  end
  local field, steps = {}, {}
  for j = 1, #fields, 2 do
    local name, value = fields[j], fields[j + 1]
    if sub(name, 1, 5) == 'step:' then
      steps[#steps + 1] = pack('<I4I4', #name - 5, #value) .. sub(name, 6) .. value
    else
      field[name] = value
    end
  end
  local state, token, lease_until, expires_at, retention, counts, first_seen, attempt, deaths =
    string.match(field.head or '', OLD_HEAD)
  local fingerprint, nonce = field.fingerprint, field.nonce
  if not (state and fingerprint and nonce and #nonce == 16) then
    return ''
  end
  local birth, tenant, trace = field.birth or '', field.tenant or '', field.trace or ''
  return pack(HEAD, FORMAT, state, expires_at, lease_until, counts, attempt, deaths, retention, first_seen, token)
    .. nonce .. pack('<BBBI4', #fingerprint, #birth, #tenant, #trace) .. fingerprint .. birth .. tenant .. trace
    .. (field.result or table.concat(steps))
end

local function or_from_hash(key, answer)
  if string.find(answer.err, 'WRONGTYPE', 1, true) then
    return from_hash(key), true
  end
  return call('GET', key) -- raises what was answered
end

-- The record, false where there is none; and whether it is a hash still.
local function read(key)
  local record = pcall('GET', key)
  if type(record) == 'table' then
    return or_from_hash(key, record)
  end
  return record
end

-- The same, and of a string no more than what stands before the names, whatever else it holds.
local function read_head(key)
  local record = pcall('GETRANGE', key, '0', HEAD_END)
  if type(record) == 'table' then
    return or_from_hash(key, record)
  end
  return record ~= '' and record
end

-- The same, and of a long string its first bytes alone: enough to see whether anything follows the names. Many
-- checkpoints, or a large result, are read by those alone who need them: `whole` reads the rest.
local START, START_END = 4096, '4095'

local function read_start(key)
  local record = pcall('GETRANGE', key, '0', START_END) -- strings: a number costs thousands of instructions
  if type(record) == 'table' then
    return or_from_hash(key, record)
  end
  if #record == START and state_of(record) and tail(record) > START then
    return call('GET', key)
  end
  return record ~= '' and record
end

local function whole(key, record, hash)
  return (hash or #record < START) and record or call('GET', key)
end

local time = call('TIME')
local now = time[1] * 1000000 + time[2]

-- A replica would answer from what it has; a write that changes nothing is refused there.
local function refused_by_a_replica()
  local answer = pcall('SETRANGE', KEYS[1], '0', '')
  if type(answer) == 'table' and string.find(answer.err, 'READONLY', 1, true) then
    return answer
  end
end
