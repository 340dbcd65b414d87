-- Completes a batch of records, fenced. KEYS: the records. ARGV: retention in ms, then the nonce, the token and
-- the result of each record. One reply a record: 1 (stored, also when repeated) or 0 (the claim is not current).
local replies = {}
for i, key in ipairs(KEYS) do
  local nonce, token, result = ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
  local record = redis.call('GET', key)
  if record and string.sub(record, 34, 49) == nonce and string.sub(record, 50, 65) == token then
    if string.sub(record, 1, 1) == 'P' then
      redis.call('SET', key, 'C' .. string.sub(record, 2, 81) .. result, 'PX', ARGV[1])
    end
    replies[i] = 1
  else
    replies[i] = 0
  end
end
return replies
