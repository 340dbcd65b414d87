-- What the fenced commands share. ARGV: for each key the fence (token and nonce as in the record), and a string with what
-- the command needs besides. `change` is given the key, the record (as `look` reads it), whose fence is current, its
-- state, that string, and the key's place; it says whether it is done, and whether it wrote.
-- The reply is one string, a character an item: 1 done, 0 lost, E unreadable.
-- Lua hashes every byte of a string that it makes: nothing is cut out where it can be compared in its place.
local function fenced(look, change)
  local replies = {}
  local wrote = false
  for i, key in ipairs(KEYS) do
    local record, hash = look(key)
    local reply = '0'
    local state = record and state_of(record)
    local fence = ARGV[2 * i - 1]
    if record and not state then
      reply = 'E'
    elseif record and #fence == LENGTHS - FENCE and find(record, fence, FENCE, true) == FENCE then
      if hash and state == IN_PROGRESS then
        call('SET', key, record) -- so that it can be changed in place
      end
      local done, changed = change(key, record, state, ARGV[2 * i], i)
      reply = done and '1' or '0'
      wrote = wrote or changed
    end
    replies[i] = reply
  end
  return not wrote and refused_by_a_replica() or table.concat(replies)
end
