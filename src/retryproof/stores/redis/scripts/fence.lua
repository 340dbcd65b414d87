-- What the fenced commands share. ARGV: from `first` on for each key the fence, token and nonce as in the record, and
-- `width` - 1 arguments of its own. `change` is given the key, the record (as `look` reads it), whose fence is current,
-- its state, and where the item's own arguments begin; it says whether it is done, and whether it wrote. The reply is
-- one string, a character an item: 1 done, 0 lost, E unreadable.
local function fenced(look, first, width, change)
  local replies = {}
  local wrote = false
  local at = first
  for i, key in ipairs(KEYS) do
    local record, hash = look(key)
    local reply = '0'
    if record and not readable(record) then
      reply = 'E'
    elseif record and sub(record, FENCE, LENGTHS - 1) == ARGV[at] then
      local state = byte(record, 2)
      if hash and state == IN_PROGRESS then
        call('SET', key, record) -- so that it can be changed in place
      end
      local done, changed = change(key, record, state, at + 1, i)
      reply = done and '1' or '0'
      wrote = wrote or changed
    end
    replies[i] = reply
    at = at + width
  end
  return not wrote and refused_by_a_replica() or table.concat(replies)
end
