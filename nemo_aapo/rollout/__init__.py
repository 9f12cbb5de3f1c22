"""From prompts to scored groups: what is generated, in which order, beside which reference rewards."""
