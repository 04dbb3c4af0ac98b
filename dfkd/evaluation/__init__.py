"""Real data, measurements and the report: what is read only before the teacher exists and after the student is done."""
