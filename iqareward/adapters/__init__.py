"""One reward in other people's trainers: a file per framework, each with that framework's call, range and traps."""
