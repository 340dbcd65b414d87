-- Removes a batch of records whose lease is not live. ARGV: "any", or "over" for those alone whose time is over and
-- whose nonce and token are those that follow for each key.
-- The reply is one string, a character a key: 1 it is gone, 0 it stays.
local replies = {}
for i, key in ipairs(KEYS) do
  local found = pcall('HMGET', key, 'head', 'nonce')
  local head = found.err or found[1]
  local state, token, lease_until, expires_at
  if head and not found.err then
    state, token, lease_until, expires_at = match(head, HEAD)
  end
  replies[i] = '0'
  if not head then
    replies[i] = ARGV[1] == 'any' and '1' or '0'
  elseif state and (state ~= IN_PROGRESS or now >= tonumber(lease_until))
    and (ARGV[1] == 'any'
      or now >= tonumber(expires_at) and found[2] == ARGV[2 * i] and token == ARGV[2 * i + 1]) then
    call('DEL', key)
    replies[i] = '1'
  end
end
return refused_by_a_replica() or table.concat(replies)
