"""Where the time of a step goes: spans and counters of every process, in the form that Perfetto and Chrome open."""
