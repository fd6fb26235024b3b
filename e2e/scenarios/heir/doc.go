// Package heir is what pods do that follow each other on the same IP: each asks for its own credentials, then tries what the
// earlier holder of its IP left behind, and leaves its own to the next: a session token and a TCP connection that is still open.
//
// The connection is handed on by the kernel's TCP_REPAIR, as checkpoints of containers are: the earlier holder's end goes without
// a word to the peer, the next holder's goes on at the same sequence numbers. Nobody on the node's side can tell.
package heir
