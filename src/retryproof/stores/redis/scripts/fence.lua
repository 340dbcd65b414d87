-- What the fenced commands share. `change` is given the key, the head's numbers and where the item's own arguments
-- begin; it is called where nonce and token are current, and says whether it is done. The reply is one string, a
-- character an item: 1 done, 0 lost, E unreadable.
local function fenced(width, change)
  local replies = {}
  local wrote = false
  local at = 1
  for i, key in ipairs(KEYS) do
    local found = redis.pcall('HMGET', key, 'head', 'nonce')
    if found.err then
      replies[i] = 'E'
    elseif not found[1] then
      replies[i] = '0'
    else
      local state, token, lease_until, expires_at, first_seen, retention, attempt, deaths, counts, steps =
        string.match(found[1], HEAD)
      if not state then
        replies[i] = 'E'
      elseif found[2] ~= ARGV[at] or token ~= ARGV[at + 1] then
        replies[i] = '0'
      else
        local done, changed = change(key, at + 2, state, token, lease_until, expires_at, first_seen, retention,
          attempt, deaths, counts, steps)
        replies[i] = done and '1' or '0'
        wrote = wrote or changed
      end
    end
    at = at + width
  end
  return (not wrote and refused_by_a_replica()) or table.concat(replies)
end
