"""How a transaction meets a database: sessions, outages, locks, the clock, ids; and whose this process is."""
