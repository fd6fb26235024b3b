// Package clients runs real, unmodified AWS clients against imdsgate, each in a pod's network
// namespace and with no credentials configured: Debian's awscli, boto3, awscrt 0.16.8, boto 2 and
// Ruby SDK, the JavaScript SDKs v2 and v3, the Go SDKs v1 and v2, and minio-go. install.sh installs
// what is not Go; a client that is missing fails its tests.
//
// Every program under programs/ keeps one contract. It fetches credentials when it starts and again
// for every line on its stdin, in the same process, and prints one JSON line per fetch:
//
//	{"client":"boto3","ok":true,"access_key_id":"ASIA…","expiration":"2026-11-21T23:05:00+00:00","seconds":0.012,"error":""}
//
// A second fetch asks the metadata endpoint anew, as the client's own refresh does: whatever the
// client keeps between two (a metadata token, a connection) it keeps, its credentials it does not.
// An error that the client reports ("unable to locate credentials") is a line with ok false. A fetch
// without any outcome within FETCH_TIMEOUT seconds is a line that says hang, and exit status 3. At
// the end of stdin a program ends with 0, whatever its fetches said; anything else is a crash.
//
// TestPrograms proves the programs, and that a hang, an abort and a failed refresh are seen as such,
// against a scripted endpoint. TestClients is the matrix of clients and situations against the
// daemon, on lab nodes: whose credentials each gets, that no client aborts or hangs over any answer,
// and that none of their packets reaches the node's real endpoint. Requests are counted on the wire,
// on the pod's side. The table of outcomes is printed and written to e2e/out/clients.md.
package clients
