// The output contract of the client programs, for those written in JavaScript (see ../../doc.go).
'use strict';
const readline = require('node:readline');

const timeout = Number(process.env.FETCH_TIMEOUT || '20');

function report(client, fields) {
  const line = { client, ok: false, access_key_id: '', expiration: '', seconds: 0, error: '', ...fields };
  require('node:fs').writeSync(1, JSON.stringify(line) + '\n');
}

// Fetches once, and once more per line on stdin. fetch resolves to {accessKeyId, expiration} or
// rejects with what the client said; a promise that never settles is reported and ends with 3.
exports.run = async (client, fetch) => {
  const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  do {
    const watchdog = setTimeout(() => {
      report(client, { seconds: timeout, error: `hang: no result within ${timeout} s` });
      process.exit(3);
    }, timeout * 1000);
    const start = process.hrtime.bigint();
    let fields;
    try {
      const { accessKeyId, expiration } = await fetch();
      fields = { ok: true, access_key_id: accessKeyId, expiration: expiration ? expiration.toISOString() : '' };
    } catch (e) {
      fields = { error: `${e.name}: ${e.message}` };
    }
    clearTimeout(watchdog);
    report(client, { ...fields, seconds: Math.round(Number(process.hrtime.bigint() - start) / 1e6) / 1e3 });
  } while (!(await lines.next()).done);
  process.exit(0);
};
