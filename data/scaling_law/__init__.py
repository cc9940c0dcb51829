"""The multilingual scaling law: its sweep, its fit, and the sampling ratios that follow."""
