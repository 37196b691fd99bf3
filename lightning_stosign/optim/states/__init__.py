"""How an optimizer's state is stored: its format, its scales, and the way there and back."""
