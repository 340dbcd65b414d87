-- Completes or releases a batch, mirroring `settle` in core/record.py. ARGV: for each key the fence, and the result of
-- state 3, or "1" where an operator settles by state 2; then a string with the state that each key is to settle in
-- (2 released, 3 completed, 4 tombstone).

-- State and retention are often equal in a batch: what follows from them is written once.
local ends = {[RELEASED] = {}, [COMPLETED] = {}, [TOMBSTONE] = {}}
local function ending(state, retention)
  local known = ends[state][retention]
  if not known then
    local duration = parse('<d', retention)
    known = {
      head = pack('<BBdd', FORMAT, state, now + duration, now),
      milliseconds = format('%.0f', math.ceil(duration / 1000) + 2), -- of the server's clock, which it rounds down
    }
    ends[state][retention] = known
  end
  return known
end

local states = ARGV[#ARGV]

return fenced(read_start, function(key, record, state, item, i)
  local new_state = byte(states, i)
  if state ~= IN_PROGRESS then
    return (state == RELEASED) == (new_state == RELEASED), false
  end
  if new_state == RELEASED then
    if item == '1' then
      record = sub(record, 1, 19) .. pack('<I4I4', 1, 0) .. sub(record, 28)
      item = ''
    end
    if unsettled(RELEASED, record) then
      -- All or part of the effect may be there: as in progress, only a reaper ends it.
      call('SETRANGE', key, '1', char(RELEASED) .. sub(record, 3, 10) .. pack('<d', now) .. sub(record, 19, 27))
      return true, true
    end
  end
  local close = ending(new_state, sub(record, 28, 35))
  local kept = sub(record, 19, tail(record) - 1)
  call('PSETEX', key, close.milliseconds, close.head .. kept .. item)
  return true, true
end)
