async def test_a_row(db):
    assert await db.fetchval("select 42") == 42
