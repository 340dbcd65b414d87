-- Completes or releases a batch, mirroring `settle` in core/record.py. ARGV: a string with the state that each key is
-- to settle in (2 released, 3 completed, 4 tombstone); then for each key the fence, and the result of state 3, or "1"
-- where an operator settles by state 2.

-- Retentions are often equal in a batch: what follows from one is written once.
local ends = {}
local function ending(retention)
  local known = ends[retention]
  if not known then
    local duration = parse('<d', retention)
    known = {
      times = pack('<dd', now + duration, now),
      milliseconds = format('%.0f', math.ceil(duration / 1000) + 2), -- of the server's clock, which it rounds down
    }
    ends[retention] = known
  end
  return known
end

local states = ARGV[1]

return fenced(read_start, 2, 2, function(key, record, state, at, i)
  local new_state = byte(states, i)
  if state ~= IN_PROGRESS then
    return (state == RELEASED) == (new_state == RELEASED), false
  end
  if new_state == RELEASED then
    if ARGV[at] == '1' then
      record = sub(record, 1, 19) .. pack('<I4I4', 1, 0) .. sub(record, 28)
    end
    if unsettled(RELEASED, record) then
      -- All or part of the effect may be there: as in progress, only a reaper ends it.
      call('SETRANGE', key, '1', char(RELEASED) .. sub(record, 3, 10) .. pack('<d', now) .. sub(record, 19, 27))
      return true, true
    end
  end
  local close = ending(sub(record, 28, 35))
  local result = new_state == COMPLETED and ARGV[at] or ''
  local kept = sub(record, 19, tail(record) - 1)
  call('SET', key, char(FORMAT, new_state) .. close.times .. kept .. result, 'PX', close.milliseconds)
  return true, true
end)
