// Package pods knows who holds an IP. It follows the pods of one node, and the service accounts and namespaces that these
// pods use, through client-go; it decides about a pod when one of its objects changes, so that a request only reads. It
// implements proxy.CallerFinder and proxy.Reporter, makes web identity tokens, and yields the keys that the cache keeps.
//
// # Rules
//
//  1. Only pods of this node, and only service accounts and namespaces that they use, are watched: one watch each, as long
//     as there is a pod. Nothing grows with the cluster. TestWatchesAreCounted
//  2. A pod is found by every IP of its status. Pods in the node's network, ended pods and other nodes' pods never are.
//     TestFindByIP. A terminating pod keeps access until its containers have ended. TestContainersEnded
//  3. An IP belongs to the single pod that is not terminating, else to the single one that is. Two of a kind: nobody gets
//     anything. TestHolder. An IP that is reused before the kubelet's status reaches us can therefore be misread for that long.
//  4. Nothing is decided before the pod, its service account and its namespace were seen or found absent: a default would be
//     a guess. kube2iam's guess gave pods the default role. TestWait, TestForbidden
//  5. Waiting is for events, never polling, and an event wakes those alone whose IP it concerns. TestWait,
//     TestWakesOnlyThoseConcerned
//  6. A change of an annotation, or of the existence of an object, is effective with its event. TestDecisionFollowsObjects
//  7. What is known stays known while the API server is away; what happened meanwhile is known after it. TestReconnect
//  8. Find takes no lock and does not allocate. TestFindWhileThingsChange
//  9. Objects may hold anything: no panic, bounded memory. TestKeep, FuzzPodFacts
//  10. Run leaves nothing behind. TestRunEnds
//
// # When a pod began to use its IP
//
// Caller.Since must never be later than the pod's own first session token, or the pod would be refused; the later it is
// otherwise, the fewer tokens of an IP's earlier holder count. It is the latest of three bounds (TestSince):
//
//   - status.startTime, to the second: the kubelet, whose clock is this node's, writes it before it makes the sandbox.
//   - The start of the pod's first container, less 10 s, while no container has restarted: nobody in the pod can ask for a
//     token before, but containerd notes the start only after the process has begun. A pod that was Pending for an hour is bounded by this one; startTime would leave the hour open.
//   - For pods that a watch told of: the moment it did, less 5 s for its delay. While the watch catches up after it was away,
//     the moment it went away, less 5 s. TestFirstSeen, TestFirstSeenByTheWatch
//
// The first two are skipped for good if they lie in the future when they are first seen: then another clock wrote them, and
// a skewed API server must not lock a pod out. Each bound is certain by itself, so Since only ever moves forward, and no
// token that the pod got is lost by that. The exception is a watch that stalls for more than 5 s without breaking: a pod
// that got a token during the stall is told once that it is not valid, and gets a new one.
package pods
