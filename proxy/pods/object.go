package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	restwatch "k8s.io/client-go/rest/watch"
)

const (
	// maxOpening bounds the watches being opened at a time. Hundreds at once would find no free stream on the one connection
	// there is and dial one each: 262 TLS handshakes were counted for 300 watches, where four connections do.
	maxOpening = 8
	// openTimeout ends the opening of a watch that the API server does not answer, and with it the wait of the others.
	openTimeout = 30 * time.Second
	// minWatch is how long an API server keeps a watch open at least; at most, twice that.
	minWatch = 5 * time.Minute
)

// follower watches one object by its name. A full node has hundreds of these, so it is made of little: one goroutine, which
// reads the stream itself. client-go's reflector, made for lists of any length, was measured at 86 KiB for each object.
type follower[O metav1.Object] struct {
	*following
	pods     *Pods
	used     *used
	list     runtime.Object
	decode   func(O) object
	selector string
	version  string // up to which the object is known; empty: not at all
}

// follow keeps u up to date until ctx is done.
func follow[O metav1.Object](ctx context.Context, p *Pods, resource string, u *used, list runtime.Object, decode func(O) object) {
	selector := fields.OneTermEqualSelector(metav1.ObjectNameField, u.name.Name).String()
	f := &follower[O]{
		following: newFollowing(resource, u.name.Namespace, selector),
		pods:      p, used: u, list: list, decode: decode, selector: selector,
	}
	defer p.failures.end(f.following)
	for pauses := p.pauses(); ctx.Err() == nil; {
		begin := time.Now()
		if err := f.watch(ctx); err == nil && time.Since(begin) > time.Second {
			pauses = p.pauses() // the server's time for a watch was over
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pauses.Step()):
		}
	}
}

// pauses are those between attempts to reach the API server.
func (p *Pods) pauses() *wait.Backoff {
	b := wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 7, Cap: time.Minute}
	if p.backoff != nil {
		b = *p.backoff
	}
	return &b
}

// watch follows the object as long as one stream lasts. The stream begins with the object as it is now or, if the last one
// ended in order, where that did. An API server that knows no such streams is asked for a list first.
func (f *follower[O]) watch(ctx context.Context) error {
	events, end, err := f.open(ctx)
	if status := apierrors.APIStatus(nil); f.version == "" && errors.As(err, &status) {
		if err = f.relist(ctx); err == nil {
			events, end, err = f.open(ctx)
		}
	}
	if err == nil {
		err = f.read(events)
		end()
	}
	if err != nil {
		f.version = ""
	}
	return err
}

// open returns the stream of events, once the API server has agreed to it, and what ends it.
func (f *follower[O]) open(ctx context.Context) (_ *restwatch.Decoder, end func(), err error) {
	defer func() { f.pods.followed(ctx, f.following, "watch", err) }()
	select {
	case f.pods.opening <- struct{}{}:
		defer func() { <-f.pods.opening }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	stream, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil {
			cancel()
		}
	}()
	defer time.AfterFunc(openTimeout, cancel).Stop()

	seconds := int64((minWatch + rand.N(minWatch)).Seconds())
	o := &metav1.ListOptions{
		Watch: true, FieldSelector: f.selector, AllowWatchBookmarks: true, TimeoutSeconds: &seconds, ResourceVersion: f.version,
	}
	if f.version == "" {
		yes := true
		o.SendInitialEvents, o.ResourceVersionMatch = &yes, metav1.ResourceVersionMatchNotOlderThan
	}
	ns := f.used.name.Namespace
	url := f.pods.client.Get().Resource(f.resource).NamespaceIfScoped(ns, ns != "").VersionedParams(o, metav1.ParameterCodec).URL()
	req, err := http.NewRequestWithContext(stream, http.MethodGet, url.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON)
	resp, err := f.pods.client.Client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			resp.Body.Close()
		}
	}()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, nil, apierrors.NewGenericServerResponse(resp.StatusCode, "watch", schema.GroupResource{Resource: f.resource}, f.used.name.Name, string(text), 0, true)
	}
	mediaType, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, nil, fmt.Errorf("content type of a watch: %w", err)
	}
	objects, frames, framer, err := f.pods.negotiator.StreamDecoder(mediaType, params)
	if err != nil {
		return nil, nil, err
	}
	return restwatch.NewDecoder(streaming.NewDecoder(framer.NewFrameReader(resp.Body), frames), objects), func() { cancel(); resp.Body.Close() }, nil
}

// read takes events until the stream ends. nil: in order.
func (f *follower[O]) read(events *restwatch.Decoder) error {
	for seen := false; ; {
		kind, o, err := events.Decode()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case kind == watch.Error:
			return apierrors.FromObject(o)
		}
		m, err := meta.Accessor(o)
		if err != nil {
			return err
		}
		switch now, ours := f.facts(o); {
		case kind == watch.Bookmark:
			if m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" && !seen {
				f.set(object{})
			}
		case ours && kind == watch.Deleted:
			f.set(object{})
		case ours:
			seen = true
			f.set(now)
		}
		f.version = m.GetResourceVersion()
	}
}

// relist asks for the object as it is now. Version 0 may be answered from the past, and an object missing there would be taken
// for confirmed absent; for one object the exact answer is cheap.
func (f *follower[O]) relist(ctx context.Context) error {
	ns := f.used.name.Namespace
	list := f.list.DeepCopyObject()
	err := f.pods.client.Get().Resource(f.resource).NamespaceIfScoped(ns, ns != "").
		VersionedParams(&metav1.ListOptions{FieldSelector: f.selector}, metav1.ParameterCodec).Do(ctx).Into(list)
	f.pods.followed(ctx, f.following, "list", err)
	if err != nil {
		return err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return err
	}
	var present object
	err = meta.EachListItem(list, func(o runtime.Object) error {
		if now, ours := f.facts(o); ours {
			present = now
		}
		return nil
	})
	f.set(present)
	f.version = m.GetResourceVersion()
	return err
}

// facts are those of an object, if it is ours: selectors are the API server's, and it is not trusted with who is who.
func (f *follower[O]) facts(o runtime.Object) (object, bool) {
	t, ok := o.(O)
	if !ok || t.GetName() != f.used.name.Name || t.GetNamespace() != f.used.name.Namespace {
		return object{}, false
	}
	return f.decode(t), true
}

func (f *follower[O]) set(o object) {
	f.pods.update(func(c *change) { f.pods.seen(c, f.used, o) })
}
