"""What is measured: row statistics, head statistics, their merge, and what rounding does to them."""
