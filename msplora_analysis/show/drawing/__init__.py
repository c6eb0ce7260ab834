"""What figures are drawn with: styles, heat maps, lines, text."""
