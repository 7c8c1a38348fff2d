"""Where actions run: torch begins here. `python -m sdforge.run` is one worker process for one device.

It takes orders as JSON and says what happens as JSON; it knows neither recipes nor the lock.
"""
