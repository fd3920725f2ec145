"""What a step costs: seconds by op, memory, dollars and joules. Pure: no clock and no device."""
