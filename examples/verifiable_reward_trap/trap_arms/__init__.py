"""The trap experiment: its data, its measures, its verdict, its page. `python -m trap_arms` is the whole of it."""
