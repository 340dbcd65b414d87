-- Claims a batch of records. KEYS: the records. ARGV: lease in µs, retention of unsettled records in ms,
-- then a fingerprint (32 bytes) and a nonce (16 bytes) for each record.
-- A record is state (1) fingerprint (32) nonce (16) token (16 digits) end of lease (16 digits) result.
-- One reply a record: A + token (acquired), C + result (completed), R (running) or M (other fingerprint).
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease_end = string.format('%016.0f', now + ARGV[1])
local replies = {}
for i, key in ipairs(KEYS) do
  local fingerprint, nonce = ARGV[2 * i + 1], ARGV[2 * i + 2]
  local record = redis.call('GET', key)
  local token
  if not record then
    token = now
  elseif string.sub(record, 2, 33) ~= fingerprint then
    replies[i] = 'M'
  elseif string.sub(record, 1, 1) == 'C' then
    replies[i] = 'C' .. string.sub(record, 82)
  elseif string.sub(record, 34, 49) == nonce then
    replies[i] = 'A' .. string.sub(record, 50, 65)
  elseif tonumber(string.sub(record, 66, 81)) > now then
    replies[i] = 'R'
  else
    token = math.max(string.sub(record, 50, 65) + 1, now)
  end
  if token then
    local digits = string.format('%016.0f', token)
    redis.call('SET', key, 'P' .. fingerprint .. nonce .. digits .. lease_end, 'PX', ARGV[2])
    replies[i] = 'A' .. digits
  end
end
return replies
