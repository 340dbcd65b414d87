-- What the fenced commands share. `change` is given the key, where the item's own arguments begin, state and token,
-- which are current, and the rest of the head; it says whether it is done, and whether it wrote. The reply is one
-- string, a character an item: 1 done, 0 lost, E unreadable.
local function fenced(change)
  local replies = {}
  local wrote = false
  local at = 1
  for i, key in ipairs(KEYS) do
    local found = pcall('HMGET', key, 'head', 'nonce')
    local head = found[1]
    local reply = '0'
    if found.err then
      reply = 'E'
    elseif head and found[2] == ARGV[at] then
      local token, rest = match(head, '^[1-4] (%d+) (%d+ %d+ %d+ [01] [01] %d+ %d+ %d+)$')
      if not token then
        reply = 'E'
      elseif token == ARGV[at + 1] then
        local done, changed = change(key, at + 2, sub(head, 1, 1), token, rest)
        reply = done and '1' or '0'
        wrote = wrote or changed
      end
    end
    replies[i] = reply
    at = at + 4
  end
  return not wrote and refused_by_a_replica() or table.concat(replies)
end
