"""What people set: profiles, server options, request options."""
