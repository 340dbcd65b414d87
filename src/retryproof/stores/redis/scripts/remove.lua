-- Removes a batch of records whose lease is not live. ARGV: "any", or "over" for those alone whose time is over and
-- whose fence (token and nonce, as in the record) is the one that follows for each key.
-- The reply is one string, a character a key: 1 it is gone, 0 it stays.
local replies = {}
for i, key in ipairs(KEYS) do
  local record = read_head(key)
  replies[i] = '0'
  if not record then
    replies[i] = ARGV[1] == 'any' and '1' or '0'
  elseif state_of(record) then
    local state, expires_at, lease_until = parse('<Bdd', record, 2)
    local wanted = ARGV[1] == 'any' or now >= expires_at and sub(record, FENCE, LENGTHS - 1) == ARGV[i + 1]
    if wanted and (state ~= IN_PROGRESS or now >= lease_until) then
      call('DEL', key)
      replies[i] = '1'
    end
  end
end
return refused_by_a_replica() or table.concat(replies)
