-- Reads a batch. ARGV: "all", "heads" without results, "over" all of those whose time is over.
-- The reply is the server's time, then for each key its fields and values, nothing where it is absent (or not over),
-- or an error's text.
local what = ARGV[1]
local NAMES = {'head', 'fingerprint', 'nonce', 'birth', 'tenant', 'trace'}

local function heads(key)
  local values = pcall('HMGET', key, unpack(NAMES))
  if values.err or not values[1] then
    return values.err and values or {}
  end
  local _, _, _, _, _, steps = match(values[1], HEAD)
  if steps == '1' then
    return pcall('HGETALL', key) -- what has steps has no result
  end
  local fields = {}
  for j, name in ipairs(NAMES) do
    if values[j] then
      fields[#fields + 1] = name
      fields[#fields + 1] = values[j]
    end
  end
  return fields
end

local function is_over(key)
  local head = pcall('HGET', key, 'head')
  if type(head) ~= 'string' then
    return false
  end
  local state, _, lease_until, expires_at = match(head, HEAD)
  return state and now >= tonumber(expires_at) and (state ~= IN_PROGRESS or now >= tonumber(lease_until))
end

local replies = {format('%.0f', now)}
for i, key in ipairs(KEYS) do
  local fields = {}
  if what == 'heads' then
    fields = heads(key)
  elseif what == 'all' or is_over(key) then
    fields = pcall('HGETALL', key)
  end
  replies[i + 1] = fields.err or fields
end
return refused_by_a_replica() or replies
