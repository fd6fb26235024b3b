// Package pods knows who holds an IP. It follows the pods of one node, and the service accounts and namespaces that these
// pods use, through client-go, and the CNI results that the node's container runtime keeps; it decides about a pod when one
// of these changes, so that a request only reads. It implements proxy.CallerFinder and proxy.Reporter, makes web identity
// tokens, and yields the keys that the cache keeps.
//
// # Rules
//
//  1. Only pods of this node, and only service accounts and namespaces that they use, are watched: one watch each, as long
//     as there is a pod, opened a few at a time. Nothing grows with the cluster. TestWatchesAreCounted,
//     TestWatchesAreOpenedAFewAtATime, TestStreamGoesOn
//  2. A pod is found by every IP of its status and of its CNI results. Pods in the node's network, ended pods and other
//     nodes' pods never are. TestFindByIP. A terminating pod keeps access until its containers have ended. TestContainersEnded
//  3. An IP belongs to the pod of the newest CNI result for it (see below). Without any it belongs to the single pod that is
//     not terminating, else to the single one that is. Two of a kind: nobody gets anything. TestClaims, TestHolder. An IP
//     that is reused before the kubelet's status reaches us can be misread for that long, but only without CNI results.
//  4. Nothing is decided before the pod, its service account and its namespace were seen or found absent: a default would be
//     a guess. kube2iam's guess gave pods the default role. TestWait, TestForbidden
//  5. Waiting is for events, never polling, and an event wakes those alone whose IP it concerns. TestWait,
//     TestWakesOnlyThoseConcerned, TestResultWakes
//  6. A change of an annotation, or of the existence of an object, is effective with its event. TestDecisionFollowsObjects
//  7. What is known stays known while the API server is away; what happened meanwhile is known after it. It is asked again after
//     a pause, whatever it answers, and led by it nowhere else. TestReconnect, TestFaultyWatches, TestFaultyAnswers, TestNoRedirects
//  8. Find takes no lock and does not allocate. TestFindWhileThingsChange
//  9. Objects and files may hold anything: no panic, bounded memory. TestKeep, TestFlood, FuzzPodFacts, FuzzResult
//  10. Run leaves nothing behind. TestRunEnds
//
// # CNI results
//
// libcni writes the result of every network of a sandbox to a file before the sandbox counts as made, so before the pod's
// first container starts; the API server tells of the IP up to seconds later. The file names the pod's UID, by which it joins
// the pod that has been known since it was bound. The rule (TestClaims):
//
//   - The newest result for an IP, by the file's time, names its holder. If that pod is not known, has ended or is not decided
//     yet, the request is held; it is never another's.
//   - If the API server shows another pod that stays (not terminating) with that IP, the result wins where that pod had a
//     result for it too: an older one, or one that was removed. Where it never had one, nobody is served.
//   - Two results of one time for two pods, or an older one that was seen to come later (the clock was set back): nobody is.
//   - Two results for two pods that run, of different networks or interfaces: nobody is. Networks may overlap, and a pod's author
//     may ask for an address of a further one.
//   - A pod whose result for an IP is removed has lost it: for 30 s it does not get it back by the API server's word, which was
//     found to be up to 6 s old. Whoever has the IP next may ask before its own result is read. TestLossEnds
//   - Otherwise results that are gone count no more; then the API server's word stands alone, at once where the whole directory
//     goes. What cannot be read, is empty or cut off says nothing until its next event. What is older than the node's boot never
//     does: sandboxes end with it, and pods that the API server confirms are served on its word.
//   - A static pod has the UID that its mirror's annotation kubernetes.io/config.mirror holds.
//   - A file that a runtime left behind, of a pod that is unknown or has ended, does not keep its IP from a pod that came later:
//     one that the kubelet took on (status.startTime) after the file was written, stays there alone by the API server's word,
//     and has no result of its own. Its sandbox is the later one, and an IP is one sandbox's at a time. Where the file is the
//     later one the IP is refused, up to the next result for it or boot: its pod may be one that the API server has not told of.
//
// The order of results rests on the node's clock being set back by no more than lies between two holders of an IP; where two
// results were seen to come, that is noticed. And the daemon must have read of the removal of an IP's last result, which inotify
// tells at once, before the IP's next holder asks: a runtime frees the IP, makes the next sandbox and starts a container in
// between. TestLabReuse in e2e leaves out the container.
//
// Whoever writes there is believed about who is who. So the directory and each file must belong to root and be writable by
// nobody else; symbolic links and whatever is no regular file are ignored, as are hard links by another name and what has more
// than 256 KiB; the newest 4,096 count. TestDirectoryIsTrusted, TestClaims, TestSwappedFiles, TestFlood. The directory may come
// and go; without it the API server's word remains. Without inotify,
// all of whose instances a pod of uid 0 can take, it is read twice a second. TestResultWakes, TestWithoutInotify
//
// What runtimes write was read in the sources of libcni (kind cniCacheV1, named network-container-interface, written after
// the last plugin's ADD and removed after the last one's DEL, which frees the IP: so a new holder's file may come before the
// old one goes) and of ocicni, which CRI-O uses: its InitCNI keeps the default directory /var/lib/cni/results, and it passes
// K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID (older ones no UID: such files are ignored). containerd's files were read on a
// real cluster, with the bridge and the ptp plugin, and are tested there. CRI-O was not run: what stands for its files is what
// libcni 1.3.1 wrote when it was called with the arguments that ocicni passes. TestRuntimesFiles
//
// # When a pod began to use its IP
//
// Caller.Since must never be later than the pod's own first session token, or the pod would be refused; the later it is
// otherwise, the fewer tokens of an IP's earlier holder count. For an IP with a CNI result it is the time of the result's file: the
// runtime starts the first container when the result is written, and the time that is kept is never later than that, because the
// kernel stamps files with the start of its tick and file systems round down. One in the future is skipped (TestResultTime). For any
// other IP it is one of these, whichever is latest (TestSince):
//
//   - status.startTime, to the second: the kubelet, whose clock is this node's, writes it before it makes the sandbox.
//   - The start of the pod's first container, less 10 s, while no container has restarted: nobody in the pod can ask for a
//     token before, but containerd notes the start only after the process has begun. A pod that was Pending for an hour is bounded
//     by this one; startTime would leave the hour open.
//   - For pods that a watch told of: the moment it did, less 5 s for its delay. While the watch catches up after it was away,
//     the moment it went away, less 5 s. TestFirstSeen, TestFirstSeenByTheWatch
//
// The first two are skipped for good if they lie in the future when they are first seen: then another clock wrote them, and
// a skewed API server must not lock a pod out. Each bound is certain by itself, so Since only ever moves forward, and no
// token that the pod got is lost by that. The exception is a watch that stalls for more than 5 s without breaking: a pod
// that got a token during the stall is told once that it is not valid, and gets a new one.
package pods
