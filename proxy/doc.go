// Package proxy is the metadata endpoint that pods talk to: it tells who asks, decides, and answers from memory. It knows
// neither Kubernetes nor AWS nor netfilter; a CallerFinder, a CredentialSource and a Reporter are its whole world.
//
// # Threat model
//
// Any pod of the node can open connections to this port and send any bytes. It must get its own role's credentials or
// nothing: never another pod's, never the node's, and nothing of the real endpoint that the table does not name. It must
// not be able to slow down, starve or crash the endpoint for others. An application that can be talked into sending
// requests (SSRF, DNS rebinding, an open forward proxy) is no better than a stranger: hence Host, session tokens and
// X-Forwarded-For are checked. Who controls the node's network stack, or shares a pod's, is out of reach.
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
//     (TestIdentityIsThePeer)
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
// net/http itself answers what it cannot read (400, 417, 431, 501, 505), always with Content-Length and Connection: close.
package proxy
