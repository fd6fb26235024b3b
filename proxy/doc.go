// Package proxy is the metadata endpoint that pods talk to: it tells who asks, decides, and answers from memory. It knows
// neither Kubernetes nor AWS nor netfilter; a CallerFinder, a CredentialSource and a Reporter are its whole world.
//
// # Threat model
//
// SECURITY.md has the whole: assets, trust, attackers, each attack with its test, and what is not defended. Of that, here:
//
//   - To be protected: the node's role, behind the real endpoint; each pod's role from every other pod; the answers
//     themselves, on which all of the node's pods depend.
//   - Trusted: that the kernel tells the true peer of a TCP connection and admits only those that were redirected here
//     (package iptables), and that the CallerFinder knows whose address that is (package pods).
//   - A pod may send any bytes, on any number of connections, at any speed. It gets its own role's credentials or nothing:
//     never another pod's, never the node's, and nothing of the real endpoint that the table does not name. It cannot slow
//     down, starve or crash the endpoint for others. (TestHostileRequests, TestHostileLoad, TestHostileMemory, all of e2e)
//   - A pod's author may write anything into its annotations: Policy is total, and what it refuses is that pod's alone.
//     (FuzzAuthorize, FuzzRoleARN, FuzzPattern)
//   - An application that can be talked into sending requests (SSRF, DNS rebinding, an open forward proxy) is no better than
//     a stranger: hence Host, session tokens and X-Forwarded-For are checked. With IMDSv1 on, which is the default as it is for
//     the real endpoint, a plain GET still gets the pod's own credentials. (TestConformance, TestHostileApplication of e2e)
//   - Not defended: who controls the node's network stack, or shares a pod's; pods of one service account on one node share
//     its session.
//
// # A request
//
//	framing, Host → table → token PUT → session token → identify → authorize → credentials
//	                 404     always 200   401             503        404, 403    503, 403
//
// Each step sees only what has passed the one before:
//
//   - The raw request target is looked up byte for byte in one table. No decoding, no cleaning, no redirect, no catch-all.
//     (TestConformance, TestPathMutations, FuzzRoute)
//   - The token PUT depends on no pod, no STS and no shared lock, so it answers while everything else is stuck: a client
//     that gets no token fails or falls back for hours. (TestTokenPutDependsOnNothing)
//   - A session token counts for the source IP that asked for it, until it expires, and not for the next holder of the IP.
//     (TestTokenOfEarlierHolder, FuzzToken)
//   - The caller is the TCP peer of the connection, looked up anew for every request. No header counts.
//     (TestIdentityIsThePeer) The connection is that pod's from then on, and reset when the IP is another's: what was not acknowledged
//     would be sent to the next holder. (TestConnectionsOfAnEarlierHolder)
//   - A route that needs a pod or a role has it as an argument.
//   - A request is held at most Options.Hold, for its pod to be known and for STS together. Then it is 503.
//     (TestHold, TestHoldEnds)
//   - The role list fails whenever the document would: failing documents abort or hang clients. (TestListFailsFirst)
//   - Status and text of every failure are made in one place, and never hold another pod's data. (TestStatus)
//   - Nothing is forwarded. A passed-through path is asked for anew, from the table, with a token of our own.
//     (TestPassthrough, TestNothingOfTheClientGoesUpstream)
//   - A request for credentials that are there allocates nothing here. (TestHitAllocatesNothing)
//   - The number of series and the memory per client are bounded. (TestSeriesAreFixed, TestConnectionsPerIP)
//
// # What one pod may take
//
//   - 256 connections of 1,024 in all (Options.MaxConnectionsPerIP, MaxConnections), or of half the files that the process may
//     open, if that is less, a quarter. HTTP/1 has one request at a time on each, so this bounds held requests and waiting
//     goroutines too. What exceeds it is reset as soon as it is accepted.
//   - When all are in use, a source IP that has fewer than another gets one of the greediest's: the one that was answered
//     the longest ago. So every pod gets its share, however many others want everything, and nobody is reset while there is
//     room. (TestConnectionsInAll, TestConnectionsOfManyGreedy)
//   - A second of the daemon's time in each second, with 10 ms in hand. An answer is charged 75 µs, a session token or a
//     connection 100 µs, a refusal or a connection without an answer 500 µs. Who has used it up waits for the next request of
//     each connection to be read, 300 ms at most: a load test of 13,000 requests a second does not notice, a loop of refusals
//     costs the daemon little, and a client that was told to close would only cost more. Who owes the whole 300 ms gets no new
//     connection. (TestBudgets, TestDebtOutlastsConnections) While nobody else asks, nobody waits. (TestAloneWaitsForNobody, TestAloneAgain)
//   - A head of 16 KiB, 5 s for it, and 48 KiB of the kernel's buffers for each connection, which the kernel doubles for its
//     own use. (TestSlowloris, TestHostileMemory)
//   - A source with 50 refused session tokens a second is told to close. (TestTokenRefusalLoop)
//
// Refused connections count as imdsgate_denied_requests_total{reason="connections"}.
//
// net/http itself answers what it cannot read (400, 417, 431, 501, 505), always with Content-Length and Connection: close.
package proxy
