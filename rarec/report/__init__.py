"""The report of an evaluated run: the terminal's table, pictures, the HTML file. Only reads what a run left."""
