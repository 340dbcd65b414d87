-- Removes a batch of records whose lease is not live. ARGV: "any", or "over" for those whose time is over alone.
-- The reply is one string, a character a key: 1 it is gone, 0 it stays.
local replies = {}
for i, key in ipairs(KEYS) do
  local head = pcall('HGET', key, 'head')
  local state, lease_until, expires_at, _
  if type(head) == 'string' then
    state, _, lease_until, expires_at = match(head, HEAD)
  end
  replies[i] = '0'
  if not head then
    replies[i] = ARGV[1] == 'any' and '1' or '0'
  elseif state and (state ~= IN_PROGRESS or now >= tonumber(lease_until))
    and (ARGV[1] == 'any' or now >= tonumber(expires_at)) then
    call('DEL', key)
    replies[i] = '1'
  end
end
return refused_by_a_replica() or table.concat(replies)
