// Package imds stands in for the real metadata endpoint of EC2 instances: IMDSv2 only, the tree of paths that an instance
// shows, credentials of a node role, and a memory of everything that reached it.
//
// All that no pod may ever see holds Mark. What reached the endpoint is known twice: as HTTP requests, and as packets of any
// protocol to any port, counted before the network stack had a say (TestLabSeesWhatReachesTheEndpoint).
package imds
