"""Stock engine and Expertier side by side: arms in memory limits, typed records, a table and a figure."""
