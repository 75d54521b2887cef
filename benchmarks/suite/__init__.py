"""What tunerkit costs beside PEFT and beside what a careful person writes by hand, measured side by side."""
