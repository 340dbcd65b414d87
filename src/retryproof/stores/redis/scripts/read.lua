-- Reads a batch. ARGV: "all", "heads" without results, "over" all of those whose time is over.
-- The reply is the server's time, then for each key the record as a string, nothing where it is absent (or not over).
local what = ARGV[1]

local function head(key)
  local record, hash = read_head(key)
  local state = record and state_of(record)
  if not state then
    return record
  end
  if state < COMPLETED then
    return (read(key)) -- with its checkpoints, of which depends whether it is settled
  end
  local last = tail(record) - 1
  return hash and sub(record, 1, last) or call('GETRANGE', key, 0, last - 1)
end

local function over(key)
  local record = read_head(key)
  local state = record and state_of(record)
  if state then
    local expires_at, lease_until = parse('<dd', record, 3)
    return now >= expires_at and (state ~= IN_PROGRESS or now >= lease_until) and read(key)
  end
end

local look = what == 'heads' and head or what == 'over' and over or read
local replies = {format('%.0f', now)}
for i, key in ipairs(KEYS) do
  replies[i + 1] = look(key) or false
end
return refused_by_a_replica() or replies
