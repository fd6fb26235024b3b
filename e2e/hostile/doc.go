// Package hostile attacks a node from inside its pods, with the real daemon, the real kernel and a stand-in for the real
// metadata endpoint that remembers every packet and request. The attacks themselves, Requests, Packets and Flood, are for whoever
// has a pod: the tests here send them from network namespaces, those of e2e/scenarios from containers of a real cluster.
//
// Names: TestHostile… is an attack that fails, TestLimit… one that works and is documented as such, with what stops it.
package hostile
