"""What several commands share: how one is declared, common arguments, and how the terminal shows things."""
