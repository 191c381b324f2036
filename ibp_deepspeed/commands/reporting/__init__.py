"""What a run leaves for a reader: its record, its measured values, and the page that is made of them."""
